"""Training identities held out, on which the best epoch can be chosen without a look at the test set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from signal_reid.data.errors import DataError
from signal_reid.data.layouts import Dataset

_STREAM = 2  # keeps this draw apart from the sampler's and the augmentation's under the same seed


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    """Take some identities out of the training split.

    The choice depends on the identities, the share and the seed alone.

    Args:
        dataset: its training split is divided; no identity falls into both parts.
        share: of the training identities to hold out, between 0 and 1, rounded to a number of them.
        seed: of the draw.

    Returns:
        The data set with the training samples that are left, and one whose query and gallery are those held out.

    Raises:
        DataError: fewer than two identities would be held out, or left.
    """
    identities = sorted(dataset.train_labels)
    count = round(share * len(identities))
    if not 2 <= count <= len(identities) - 2:
        raise DataError(
            f"training.validation must hold out and leave at least 2 of {len(identities)} training identities, "
            f"got {share:g}, which holds out {count}"
        )
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_STREAM,)))
    held = {identities[index] for index in random.choice(len(identities), count, replace=False)}
    samples = [sample for sample in dataset.train if sample.identity in held]
    left = [sample for sample in dataset.train if sample.identity not in held]
    return replace(dataset, train=left), replace(dataset, train=left, query=samples, gallery=samples)
