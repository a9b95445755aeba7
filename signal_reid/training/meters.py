"""Running means that stay on the device until they are asked for."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


class RunningMeans:
    """Means of named () tensors over the steps of an epoch; adding does not wait for the device."""

    def __init__(self, sums: Mapping[str, float] | None = None, count: int = 0) -> None:
        """Begin with nothing, or with the sums of some steps that are already done."""
        self._sums: dict[str, Tensor | float] = dict(sums or {})
        self._count = count

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Count one step's values."""
        self._count += 1
        for name, value in values.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def sums(self) -> dict[str, float]:
        """The sum of each; waits for the device."""
        return {name: float(value) for name, value in self._sums.items()}

    def means(self) -> dict[str, float]:
        """The mean of each; waits for the device."""
        return {name: value / self._count for name, value in self.sums().items()}
