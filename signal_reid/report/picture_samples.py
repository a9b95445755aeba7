"""The test samples that pictures are drawn of: the named ones, some of identities far apart, a batch, or all."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch

from signal_reid.config import Config
from signal_reid.data import Augmentation, Dataset, Sample, make_eval_loader
from signal_reid.data.loading import Cache
from signal_reid.data.progress import ProgressCallback
from signal_reid.methods.pictures import Shown, joined
from signal_reid.runtime.errors import InputError

_Item = TypeVar("_Item")


class TestSamples:
    """The samples of a data set's query and gallery, as `methods.pictures.Subjects` says.

    Args:
        config: `data` and `evaluation.batch_size` are used.
        dataset: its query and gallery splits.
        device: where the models are.
        queries: names of samples, the query's before the gallery's; the directory and the suffix may be left out.
        count: how many samples `chosen` gives where none are named; none: as many as suit the picture.
        limit: how many samples `all` gives at most.
        progress: called by `all` with the samples done and their number.

    Raises:
        InputError: no sample has a name that was asked for, or a count below 1.
    """

    __test__ = False  # pytest takes the name for a test's

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        device: torch.device,
        queries: Sequence[str] = (),
        count: int | None = None,
        limit: int | None = None,
        progress: ProgressCallback | None = None,
    ) -> None:
        for name, number in (("count", count), ("limit", limit)):
            if number is not None and number < 1:
                raise InputError(f"{name} must be at least 1, got {number}")
        self.modalities = dataset.modalities
        self._config = config
        self._dataset = dataset
        self._device = device
        self._named = [find_sample(dataset, name) for name in queries]
        self._count = count
        self._limit = limit
        self._progress = progress
        self._normalize = Augmentation(config.data).normalize

    def chosen(self, default: int) -> Shown:
        """The named samples; where none are, `count` (or `default`) of the query's, of identities far apart."""
        if self._named:
            return self._load(self._named)
        first = list({sample.identity: sample for sample in reversed(self._dataset.query)}.values())[::-1]
        return self._load(_spread(first, self._count or default))

    def batch(self) -> Shown:
        """As many test samples as a training batch has, identity after identity; those of named samples first."""
        identities = self._by_identity()
        places = max(2, self._config.data.batch_size // self._config.data.instances)
        named = list(dict.fromkeys(sample.identity for sample in self._named))[:places]
        others = _spread([identity for identity in identities if identity not in named], places - len(named))
        kept = [_spread(identities[identity], self._config.data.instances) for identity in (*named, *others)]
        return self._load([sample for samples in kept for sample in samples])

    def all(self) -> Iterator[Shown]:
        """Every test sample once, or `limit` of them, spread evenly."""
        samples, _, _ = self._dataset.evaluation_samples()
        samples, done = _spread(samples, self._limit or len(samples)), 0
        for shown in self._batches(samples, self._config):
            done += len(shown.names)
            if self._progress is not None:
                self._progress(done, len(samples))
            yield shown

    def _by_identity(self) -> dict[int, list[Sample]]:
        identities: dict[int, list[Sample]] = {}
        for sample in self._dataset.evaluation_samples()[0]:
            identities.setdefault(sample.identity, []).append(sample)
        return dict(sorted(identities.items()))

    def _load(self, samples: Sequence[Sample]) -> Shown:
        here = self._config.data.model_copy(update={"workers": 0})  # starting processes would take longer
        return joined(list(self._batches(samples, self._config.model_copy(update={"data": here}))))

    def _batches(self, samples: Sequence[Sample], config: Config) -> Iterator[Shown]:
        cache: Cache | None = None if config.data.cache == "packed" else "none"  # each is read once
        for batch in make_eval_loader(config, samples, self._device, cache):
            inputs = self._normalize(batch.images.to(self._device, non_blocking=True))
            names = [samples[index].name for index in batch.indices.tolist()]
            yield Shown(batch.images, inputs, batch.cameras.to(self._device), batch.labels, names)


def find_sample(dataset: Dataset, name: str) -> Sample:
    """The query of that name, else the gallery's sample; the directory and the suffix may be left out.

    Raises:
        InputError: there is none, or several samples of one split have the short name; near names are given.
    """
    for split in (dataset.query, dataset.gallery):
        for same in (_whole, _last_part, _stem):
            found = [sample for sample in split if same(sample.name) == name]
            if len(found) > 1:
                raise InputError(
                    f"{len(found)} samples are named {name!r}, such as {found[0].name} and {found[1].name}"
                )
            if found:
                return found[0]
    known = [sample.name for sample in dataset.query]
    near = difflib.get_close_matches(name, known, 3, 0) or known[:3]
    raise InputError(f"no sample of the query or gallery is named {name!r}; near it: {', '.join(near)}")


def _whole(name: str) -> str:
    return name


def _last_part(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _stem(name: str) -> str:
    return _last_part(name).rsplit(".", 1)[0]


def _spread(items: Sequence[_Item], count: int) -> list[_Item]:
    """At most `count` of the items in their order, evenly apart."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]
