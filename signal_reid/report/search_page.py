"""A page of ranked pictures: what a search of an index found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from signal_reid.config import Config
from signal_reid.data import DataError, Sample, decode
from signal_reid.report.page import write_page
from signal_reid.runtime.troubles import explain
from signal_reid.search import Description, Entry, Hit
from signal_reid.search.segments import UNKNOWN
from signal_reid.search.sources import read_as, readings


@dataclass(frozen=True, eq=False)
class Shown:
    """An item as the page shows it.

    Args:
        entry: what is known of it.
        modalities: of which it has images that can be read.
        images: (m, 3, H, W) uint8 of these.
        problem: why there are none, or not all.
    """

    entry: Entry
    modalities: Sequence[str]
    images: Tensor
    problem: str = ""


def write_search_page(
    path: str | Path,
    config: Config,
    description: Description,
    queries: Sequence[Entry],
    hits: Sequence[Sequence[Hit]],
) -> None:
    """Write what was found for each query, with its pictures, as one file that needs no other.

    An image that is gone, or cannot be read any more, is named in its place.

    Args:
        path: the file to replace.
        config: `data` says how images are read, and their size.
        description: of the index.
        queries: what was asked.
        hits: what was found for each.

    Raises:
        FileNotFoundError: no such directory.
        InputError: the page would be too large.
    """
    shown: dict[Entry, Shown] = {}
    for entry in (*queries, *(hit.entry for found in hits for hit in found)):
        if entry not in shown:
            shown[entry] = _shown(entry, description.modalities, config)
    lists = [
        (shown[query], [(hit, shown[hit.entry]) for hit in found]) for query, found in zip(queries, hits, strict=True)
    ]
    facts = [("items", len(description)), ("kind", description.kind), ("weights", description.fingerprint[:12])]
    if description.threshold is not None:
        rate = description.threshold.false_accept_rate
        facts.append(("threshold", f"{description.threshold.score:.4f}, false-accept rate {rate:.3g}"))
    write_page(path, "search.html.j2", title="What was found", sections=(), lists=lists, facts=facts)


def _shown(entry: Entry, modalities: Sequence[str], config: Config) -> Shown:
    names, images, problems = [], [], []
    sources = read_as(entry, readings(config, modalities)).sources
    for name, source in zip(modalities, sources, strict=True):
        if source is None:
            continue
        try:
            images.append(decode(Sample(0, 0, UNKNOWN, (source,), entry.name), config.data.image_size)[0])
            names.append(name)
        except (DataError, OSError) as error:
            if explain(error) is not None:
                raise
            problems.append(f"{name} cannot be read")
    stacked = torch.stack(images) if images else torch.empty(0, 3, *config.data.image_size, dtype=torch.uint8)
    return Shown(entry, names, stacked, ", ".join(problems))
