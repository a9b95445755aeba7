"""A run as one HTML file: numbers, curves and ranked lists."""

from signal_reid.report.contents import Headline, Picture, QueryResult, RankedItem, RankedList, RunReport, Table
from signal_reid.report.html import write_report
from signal_reid.report.selection import Ranking, choose_queries

__all__ = [
    "Headline",
    "Picture",
    "QueryResult",
    "RankedItem",
    "RankedList",
    "Ranking",
    "RunReport",
    "Table",
    "choose_queries",
    "write_report",
]
