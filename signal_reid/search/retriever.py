"""From images to an answer: a model with an index of what it has seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from signal_reid.data.progress import ProgressCallback
from signal_reid.runtime.distributed import ALONE, Processes
from signal_reid.runtime.errors import InputError
from signal_reid.search.calibration import Threshold, calibrate
from signal_reid.search.extraction import FeatureMaker
from signal_reid.search.index import Description, Hit, Index, check_free
from signal_reid.search.neighbours import Kind, find_faiss
from signal_reid.search.segments import Entry, Storage
from signal_reid.search.sources import find_entries, query_entry

Images = Mapping[str, Any]
"""Images of one item by modality: paths, Pillow images, or uint8 arrays of shape (H, W, 3) or (H, W)."""


class Retriever:
    """Finds, for images of any of the model's modalities, the most similar items of an index.

        retriever = signal_reid.Retriever("best.safetensors")
        retriever.build("gallery.index", "gallery")  # gallery/RGB/0001.jpg, gallery/TI/0001.jpg, ...
        retriever.calibrate(false_accept_rate=0.001)  # where identities are known
        for hit in retriever.search({"RGB": "a.jpg", "TI": "a_thermal.png"}, top=5):
            print(hit.rank, hit.name, hit.score, hit.accepted)

    Args:
        weights: a checkpoint of any supported naming.
        index: a directory that `build` or `signal-reid index build` wrote; none: one is built, or there is none.
        config: a published name or a file; none: the configuration that the weights carry, else `config.yml` beside
            them.
        overrides: `key=value` settings applied on top.
        processes: that share the work.

    Raises:
        FileNotFoundError, ConfigError, CheckpointError: see `signal_reid.evaluation.trained.load_model`.
        InputError: other weights made the index, or it is damaged.
    """

    def __init__(
        self,
        weights: str | Path,
        index: str | Path | None = None,
        config: str | Path | None = None,
        overrides: Sequence[str] = (),
        *,
        processes: Processes = ALONE,
    ) -> None:
        self.maker = FeatureMaker.load(weights, config, overrides, processes)
        self.processes = processes
        self._weights = weights
        self._index: Index | None = None
        if index is not None:
            self.open(index)

    @property
    def index(self) -> Index:
        """The index that is searched.

        Raises:
            InputError: there is none yet.
        """
        if self._index is None:
            raise InputError("there is no index yet; build one, or open one")
        return self._index

    def open(self, path: str | Path) -> Index:
        """Take an index that these weights made.

        Raises:
            FileNotFoundError: there is none.
            InputError: other weights made it, or it is damaged.
        """
        index = Index(path)
        made = index.description.fingerprint
        if made != self.maker.fingerprint:
            raise InputError(
                f"{path} was made by other weights or settings than {self._weights} "
                f"({made[:12]}, these are {self.maker.fingerprint[:12]}); build it again with these"
            )
        self._index = index
        return index

    def build(
        self,
        path: str | Path,
        source: str | Path | Sequence[Entry],
        *,
        patterns: Mapping[str, str] | None = None,
        kind: Kind = "exact",
        storage: Storage = "fp16",
        progress: ProgressCallback | None = None,
    ) -> Index:
        """Make an index of images, which is searched from then on; one that cannot be made leaves nothing.

        Args:
            path: the directory to write, which holds no index yet.
            source: a directory or a list (see `find_entries`), or items.
            patterns: by modality, where the images of a directory are.
            kind: `exact`, or `flat`, `ivf` or `hnsw` of FAISS.
            storage: what the features are kept in, `fp16` or `fp32`.
            progress: called with the items done and their number, of this process's share.

        Raises:
            FileNotFoundError, InputError, DataError: see `find_entries`; or there is an index already, or no FAISS.
            LostProcessError: a process ended.
        """
        if kind != "exact":
            find_faiss()
        check_free(Path(path))
        entries = self._entries(source, patterns)
        dimension = self.maker.dimension
        self.processes.wait()
        if self.processes.local_rank == 0:  # of each machine, which may have a disk of its own
            description = Description(self.maker.fingerprint, self.maker.modalities, dimension, storage, kind)
            Index.create(path, description)
        self.processes.wait()
        self._index = Index(path)
        try:
            return self._add(entries, progress)
        except BaseException:
            self._index = None
            if self.processes.local_rank == 0:
                Index(path).discard_if_empty()
            raise

    def add(
        self,
        source: str | Path | Sequence[Entry],
        *,
        patterns: Mapping[str, str] | None = None,
        progress: ProgressCallback | None = None,
    ) -> Index:
        """Append images to the index; nothing that is there is written again. See `build` for arguments and errors."""
        return self._add(self._entries(source, patterns), progress)

    def search(self, images: Images, top: int = 10) -> list[Hit]:
        """The items most similar to images of one moment, the best first.

        Args:
            images: of any of the model's modalities.
            top: how many items.

        Raises:
            InputError, FileNotFoundError, DataError: images that cannot be used, or a damaged index.
        """
        return self.search_many([images], top)[0]

    def search_many(self, items: Sequence[Images | Entry], top: int = 10) -> list[list[Hit]]:
        """`search` for several queries at once, each of which may have modalities of its own."""
        index = self.index
        index.load(self.processes)
        return index.search(self.features(items), top, self.processes)

    def features(self, items: Sequence[Images | Entry]) -> Tensor:
        """Features (n, d) of unit length, in fp32 on the CPU, of images in files or in memory."""
        if not items:
            raise InputError("there are no images")
        modalities = self.maker.modalities
        made: list[Tensor] = []
        for item in items:
            if isinstance(item, Entry):
                made += self.maker.of_entries([item])
            elif all(isinstance(image, (str, Path)) for image in item.values()):
                made += self.maker.of_entries([query_entry(item, modalities)])
            else:
                made.append(self.maker.of_arrays([item]))
        return torch.cat(made)

    def features_of(self, entries: Sequence[Entry], progress: ProgressCallback | None = None) -> Tensor:
        """Features (n, d) of items, in every process; several processes share the work."""
        share = self.processes.share(entries, self.maker.config.evaluation.batch_size)
        parts = list(self.maker.of_entries(share, progress))
        gathered = self.processes.gather(torch.cat(parts) if parts else None, "cpu")
        if gathered is None:
            raise InputError("there are no images")
        return gathered

    def calibrate(self, false_accept_rate: float) -> Threshold:
        """Choose the threshold at which pairs of different identities are accepted at a rate, and keep it.

        Raises:
            InputError: the identities of too few items are known.
        """
        threshold = calibrate(*self.index.labelled(), false_accept_rate)
        self.index.set_threshold(threshold)
        return threshold

    def _entries(self, source: str | Path | Sequence[Entry], patterns: Mapping[str, str] | None) -> list[Entry]:
        if isinstance(source, (str, Path)):
            return find_entries(source, self.maker.modalities, patterns)
        if not source:
            raise InputError("there are no items to add")
        return list(source)

    def _add(self, entries: Sequence[Entry], progress: ProgressCallback | None) -> Index:
        share = self.processes.share(entries, self.maker.config.evaluation.batch_size)
        self.index.add(share, self.maker.of_entries(share, progress), self.processes)
        return self.index
