"""A run as one HTML file: numbers, curves and ranked lists."""

from signal_reid.report.contents import Headline, PagePicture, QueryResult, RankedItem, RankedList, RunReport
from signal_reid.report.html import write_report
from signal_reid.report.selection import Ranking, choose_queries

__all__ = [
    "Headline",
    "PagePicture",
    "QueryResult",
    "RankedItem",
    "RankedList",
    "Ranking",
    "RunReport",
    "choose_queries",
    "write_report",
]
