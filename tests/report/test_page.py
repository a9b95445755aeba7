import base64
import csv
import hashlib
import io
import re
from html import unescape

import pytest
import torch

from signal_reid.report import QueryResult, RankedList, RunReport, write_report
from signal_reid.report.history import Curve
from signal_reid.report.images import SIDES
from signal_reid.report.tables import csv_text, curve_table, query_rows
from signal_reid.runtime.errors import InputError


def test_the_policy_names_the_only_script_and_style_by_what_they_hold(page, report):
    source = page(report).source
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', source)
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", source, re.DOTALL)
        found = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src &#39;sha256-{found}&#39;" in policy
    assert "unsafe" not in policy
    assert policy.startswith("default-src &#39;none&#39;")
    assert re.findall(r"\sstyle=|\son\w+=", source) == []


@pytest.fixture
def noisy():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (4, 3, 3, 128, 64), generator=generator, dtype=torch.uint8)
    return RunReport("noise", ranked_lists=[RankedList(triplet, 1, "cam1", 1.0, []) for triplet in images])


def test_images_are_scaled_until_the_page_keeps_its_size_and_the_page_says_so(tmp_path, noisy):
    sizes = []
    for limit in (10**7, 120_000):
        write_report(tmp_path / "report.html", noisy, limit)
        page = (tmp_path / "report.html").read_text()
        assert len(page) <= limit
        assert page.count("<img") == 12
        sizes.append(len(page))
        assert ("None of its 12 images had to be scaled down." in page) == (limit == 10**7)
    assert sizes[0] > 120_000
    assert "This file is at most 0.12 MB large." in page
    (side,) = re.findall(r"12 of its 12 images were scaled down, to at most (\d+) pixels a side", page)
    assert int(side) in SIDES


def test_a_page_that_cannot_keep_its_size_is_refused_with_the_remedy(tmp_path, noisy):
    with pytest.raises(InputError, match=r"the page takes .* with images of at most 32 pixels, .* show fewer queries"):
        write_report(tmp_path / "report.html", noisy, 1000)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_no_text_is_written(page, triplet):
    shown = page(RunReport("a", ranked_lists=[RankedList(triplet(), 1, "cam1", 1.0, [], "\udcff.jpg")])).text
    assert "\\udcff.jpg" in shown


def test_the_csv_holds_every_query_and_nothing_that_a_spreadsheet_runs():
    names = ["plain.jpg", "=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "\uff1d1", 'a";=1', "a\n=1"]
    queries = [QueryResult(name, 3, "cam1", 0.75, (1, 4), name, 3) for name in names]
    queries.append(QueryResult("unmatched", 4, "=c", float("nan"), ()))
    header, *rows = csv.reader(io.StringIO(csv_text(query_rows(queries)), newline=""))
    defused = [names[0], *(f"'{name}" for name in names[1:8]), *names[8:]]
    assert [row[0] for row in rows] == [*defused, "unmatched"]
    assert [row[header.index("nearest")] for row in rows[:-1]] == defused
    assert rows[0][1:7] == ["3", "cam1", "0.75", "2", "1", "1 4"]
    assert rows[-1][1:] == ["4", "'=c", "", "0", "", "", "", ""]


def test_a_long_curve_has_a_table_that_says_what_it_leaves_out():
    curve = Curve("loss", [float(i) for i in range(1000)], [0.5] * 1000)
    table = curve_table([curve], "step", "Losses")
    assert table.title == "Losses; 200 of 1000 points, spread evenly"
    assert (len(table.rows), table.rows[0], table.rows[-1]) == (200, ["0", "0.5"], ["999", "0.5"])


def test_the_filter_has_every_camera_once_by_its_number(page):
    names = ["c10", "c2", "C2", 'a  "b"', "c2"]
    shown = page(RunReport("a", queries=[QueryResult("q", 1, name, 0.5, (1,)) for name in names])).source
    options = re.findall(r"<option value=\"([^\"]+)\">([^<]+)</option>", shown.split('name="camera"')[1])
    offered = [unescape(value) for value, text in options if value == text]
    assert offered[:4] == ["C2", 'a  "b"', "c2", "c10"]
    assert {unescape(name) for name in re.findall(r'data-camera="(.*?)"', shown)} == set(names)
