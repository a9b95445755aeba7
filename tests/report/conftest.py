from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from signal_reid.figures import Table
from signal_reid.report import (
    Headline,
    PagePicture,
    QueryResult,
    RankedItem,
    RankedList,
    RunReport,
    write_report,
)
from signal_reid.report.contents import Marks, Panel

VOID = {"meta", "img", "br", "input"}


class Page(HTMLParser):
    """An HTML file as its elements (tag, attributes) and its text; fails on tags that do not match."""

    def __init__(self, source: str):
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text += data

    def having_class(self, name: str) -> list[tuple[str, dict[str, str | None]]]:
        return [element for element in self.elements if name in (element[1].get("class") or "").split()]


@pytest.fixture
def page(tmp_path: Path) -> Callable[[RunReport], Page]:
    """Writes a report and reads it back."""

    def write(report: RunReport) -> Page:
        write_report(tmp_path / "report.html", report)
        return Page((tmp_path / "report.html").read_text())

    return write


@pytest.fixture
def triplet() -> Callable[..., torch.Tensor]:
    def make(level: int = 128, height: int = 8, width: int = 4, modalities: int = 3) -> torch.Tensor:
        return torch.full((modalities, 3, height, width), level, dtype=torch.uint8)

    return make


@pytest.fixture
def history() -> list[dict]:
    """Two epochs of two steps, as the training loop writes them."""
    rows: list[dict] = []
    for epoch in (1, 2):
        for step in (2 * epoch - 1, 2 * epoch):
            rows.append({"kind": "step", "epoch": epoch, "step": step, "total": 6.0 / step, "head_0": 4.0 / step})
        numbers = {"total": 5.125 / epoch, "head_0": 2.0, "learning_rate": 3e-4 / epoch, "triplets_per_second": 201.5}
        numbers |= {"seconds": 1.0, "mfu": 0.25, "data_seconds": 0.1, "forward_seconds": 0.3, "backward_seconds": 0.5}
        numbers |= {"optimizer_seconds": 0.1, "peak_memory_bytes": 2**30}
        rows.append({"kind": "epoch", "epoch": epoch, "step": 2 * epoch, **numbers})
        rows.append({"kind": "eval", "epoch": epoch, "step": 2 * epoch, "mAP": 0.4 * epoch, "rank1": 0.432 * epoch})
    return rows


@pytest.fixture
def report(history, triplet) -> RunReport:
    items = [RankedItem(triplet(10 * k), 7 if k != 1 else 99, f"cam{k + 1}", 0.25 + k / 8, k != 1) for k in range(3)]
    marks = [Marks("kept", [("M0 0h4v4h-4z", 1.0)]), Marks("kept by RGB", [("M0 4h4v4h-4z", 0.5)])]
    panels = [Panel(name, triplet(90)[0], marks) for name in ("RGB", "NI", "TI")]
    seen = PagePicture("Tokens", "what is kept", panels=panels, tables=[Table("kept", ["by", "RGB"], [["any", 3]])])
    precision = (1 + 2 / 3 + 3 / 4) / 3
    return RunReport(
        title="Signal on RGBNT201",
        dataset=[("training triplets", 3951)],
        headlines=[Headline("before", 0.123, 0.111, 0.222, 0.333), Headline("after", 0.803, 0.852, 0.911, 0.94)],
        history=history,
        ranked_lists=[RankedList(triplet(200), 7, "cam6", precision, items, "000007_cam6.jpg", (1, 3, 4), [seen])],
        queries=[
            QueryResult("000007_cam6.jpg", 7, "cam6", precision, (1, 3, 4), "000007_cam1.jpg", 7),
            QueryResult("000008_cam2.jpg", 8, "cam2", 0.25, (4,), "000007_cam1.jpg", 7),
        ],
        config="data:\n  root: <here>\n",
        environment=[("PyTorch", "2.7.0")],
    )
