"""Datasets, from files on disk to batches on the device.

Everything below is imported when it is first asked for, so that the names of the data sets need nothing but the
standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from signal_reid.data.augmentation import Augmentation, augmentation_generator
    from signal_reid.data.checking import check_dataset
    from signal_reid.data.configured import open_configured, options_of
    from signal_reid.data.decoding import decode
    from signal_reid.data.errors import DataError, Problem
    from signal_reid.data.layouts import Dataset, ImageSource, Options, Sample, locate_dataset, open_dataset
    from signal_reid.data.loading import (
        Batch,
        BatchLoader,
        TrainLoader,
        TripletDataset,
        make_eval_loader,
        make_train_loader,
    )
    from signal_reid.data.packing import PackedImages, open_packed, pack, packed_path
    from signal_reid.data.prefetching import prefetch
    from signal_reid.data.sampler import IdentitySampler
    from signal_reid.data.validation import hold_out

_HOMES = {
    "Augmentation": "augmentation",
    "Batch": "loading",
    "BatchLoader": "loading",
    "DataError": "errors",
    "Dataset": "layouts",
    "IdentitySampler": "sampler",
    "ImageSource": "layouts",
    "Options": "layouts",
    "PackedImages": "packing",
    "Problem": "errors",
    "Sample": "layouts",
    "TrainLoader": "loading",
    "TripletDataset": "loading",
    "augmentation_generator": "augmentation",
    "check_dataset": "checking",
    "decode": "decoding",
    "hold_out": "validation",
    "locate_dataset": "layouts",
    "make_eval_loader": "loading",
    "make_train_loader": "loading",
    "open_configured": "configured",
    "open_dataset": "layouts",
    "open_packed": "packing",
    "options_of": "configured",
    "pack": "packing",
    "packed_path": "packing",
    "prefetch": "prefetching",
}

__all__ = [
    "Augmentation",
    "Batch",
    "BatchLoader",
    "DataError",
    "Dataset",
    "IdentitySampler",
    "ImageSource",
    "Options",
    "PackedImages",
    "Problem",
    "Sample",
    "TrainLoader",
    "TripletDataset",
    "augmentation_generator",
    "check_dataset",
    "decode",
    "hold_out",
    "locate_dataset",
    "make_eval_loader",
    "make_train_loader",
    "open_configured",
    "open_dataset",
    "open_packed",
    "options_of",
    "pack",
    "packed_path",
    "prefetch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"signal_reid.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
