"""Running means that stay on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class RunningMeans:
    """Means of named () tensors over the steps of an epoch; adding does not wait for the device."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's values."""
        self._count += 1
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def means(self) -> dict[str, float]:
        """The mean of each; waits for the device."""
        return {name: value.item() / self._count for name, value in self._sums.items()}
