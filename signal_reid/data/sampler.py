"""Identity-balanced batches: P identities, K images of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

from signal_reid.data.errors import DataError
from signal_reid.runtime.distributed import ALONE, Processes

_STREAM = 0  # keeps these draws apart from the augmentation's under the same seed


class IdentitySampler(Sampler[list[int]]):
    """Batches of `batch_size / instances` random identities with `instances` images each.

    An epoch deals each identity's images, shuffled, in groups of `instances` (an identity with fewer draws them with
    replacement, remainders are dropped) and ends when too few identities have groups left. The batches depend on
    the seed and the epoch alone.

    Args:
        labels: identity of each sample, by index.
        batch_size: samples per batch.
        instances: images per identity in a batch.
        seed: non-negative.
        processes: that deal each batch among them: iteration gives this process's part of every batch.

    Raises:
        DataError: the processes do not divide `batch_size`, it is not a multiple of `instances`, or there are too few
            identities for one batch.
    """

    def __init__(
        self, labels: Sequence[int], batch_size: int, instances: int, seed: int, processes: Processes = ALONE
    ) -> None:
        if instances < 1 or batch_size < instances or batch_size % instances:
            raise DataError(f"batch_size must be a multiple of instances ({instances}), got {batch_size}")
        if batch_size % processes.size:
            raise DataError(f"{processes.size} processes must divide data.batch_size, got {batch_size}")
        self.batch_size = batch_size
        each = batch_size // processes.size
        self.rows = range(processes.rank * each, (processes.rank + 1) * each)
        """The rows of every batch that this process has."""
        self.identities_per_batch = batch_size // instances
        self.instances = instances
        self.seed = seed
        self._members = [np.flatnonzero(np.asarray(labels) == label) for label in np.unique(labels)]
        if len(self._members) < self.identities_per_batch:
            raise DataError(
                f"a batch of {batch_size} with {instances} instances needs at least {self.identities_per_batch} "
                f"identities, got {len(self._members)}"
            )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Choose the epoch that iteration deals, and how many of its batches it passes over."""
        self.epoch, self.first = epoch, first
        self._batches = self.part(epoch, first)

    def part(self, epoch: int, first: int = 0) -> list[list[int]]:
        """This process's part of an epoch's batches, as sample indices, without the `first` of them."""
        return [batch[self.rows.start : self.rows.stop] for batch in self.batches(epoch)[first:]]

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, whole, as sample indices."""
        random = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_STREAM, epoch)))
        groups = [self._deal(members, random) for members in self._members]
        left = list(range(len(groups)))
        batches: list[list[int]] = []
        while len(left) >= self.identities_per_batch:
            chosen = [left[i] for i in random.choice(len(left), self.identities_per_batch, replace=False)]
            batches.append([index for identity in chosen for index in groups[identity].pop()])
            left = [identity for identity in left if groups[identity]]
        return batches

    def _deal(self, members: np.ndarray, random: np.random.Generator) -> list[list[int]]:
        if len(members) < self.instances:
            dealt = random.choice(members, self.instances, replace=True)
        else:
            dealt = random.permutation(members)[: len(members) // self.instances * self.instances]
        groups: list[list[int]] = dealt.reshape(-1, self.instances).tolist()
        return groups

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        """Batches of the current epoch that iteration deals."""
        return len(self._batches)
