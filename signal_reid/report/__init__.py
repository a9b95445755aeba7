"""A run as one HTML file: numbers, curves and ranked lists."""

from signal_reid.report.contents import Headline, RankedItem, RankedList, RunReport
from signal_reid.report.html import write_report
from signal_reid.report.selection import choose_queries, ranked_lists

__all__ = [
    "Headline",
    "RankedItem",
    "RankedList",
    "RunReport",
    "choose_queries",
    "ranked_lists",
    "write_report",
]
