"""Search: features of one's own images, an index of them on disk, and the items most similar to a query."""

from signal_reid.search.calibration import Threshold, calibrate
from signal_reid.search.index import Description, Hit, Index
from signal_reid.search.retriever import Retriever
from signal_reid.search.segments import Entry
from signal_reid.search.sources import entries_of, find_entries

__all__ = [
    "Description",
    "Entry",
    "Hit",
    "Index",
    "Retriever",
    "Threshold",
    "calibrate",
    "entries_of",
    "find_entries",
]
