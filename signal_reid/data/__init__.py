"""Datasets, from files on disk to batches on the device."""

from signal_reid.data.augmentation import Augmentation, augmentation_generator
from signal_reid.data.checking import check_dataset
from signal_reid.data.decoding import decode
from signal_reid.data.errors import DataError, Problem
from signal_reid.data.layouts import Dataset, ImageSource, Sample, locate_dataset, open_dataset
from signal_reid.data.loading import (
    Batch,
    BatchLoader,
    TrainLoader,
    TripletDataset,
    make_eval_loader,
    make_train_loader,
)
from signal_reid.data.packing import PackedImages, open_packed, pack, packed_path
from signal_reid.data.prefetch import prefetch
from signal_reid.data.sampler import IdentitySampler

__all__ = [
    "Augmentation",
    "Batch",
    "BatchLoader",
    "DataError",
    "Dataset",
    "IdentitySampler",
    "ImageSource",
    "PackedImages",
    "Problem",
    "Sample",
    "TrainLoader",
    "TripletDataset",
    "augmentation_generator",
    "check_dataset",
    "decode",
    "locate_dataset",
    "make_eval_loader",
    "make_train_loader",
    "open_dataset",
    "open_packed",
    "pack",
    "packed_path",
    "prefetch",
]
