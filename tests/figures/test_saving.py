"""Pictures as files: the format by the suffix, a paper's width, the same picture the same file."""

import io
import re

import matplotlib as mpl
import pytest
from PIL import Image

from signal_reid.figures import Picture, picture_path, png_bytes, save_figure, svg_text
from signal_reid.figures.style import WIDTHS, drawing_style, new_figure
from signal_reid.runtime.errors import InputError


@pytest.fixture
def figure():
    with drawing_style():
        figure = new_figure("column", 1.0)
        figure.text(0.5, 0.5, "$name_with$ & <tags>")
    return figure


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("SVG", b"<?xml"), ("pdf", b"%PDF")], ids=["png", "svg", "pdf"]
)
def test_the_suffix_names_the_format(figure, tmp_path, suffix, begins):
    Picture("a", "A", figure, "").save(tmp_path / f"a.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes().startswith(begins)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.png.txt"])
def test_another_suffix_is_one_line(name):
    with pytest.raises(InputError, match=r"must end in \.png, \.svg or \.pdf, got " + re.escape(name)):
        picture_path(name)


def test_a_picture_that_cannot_be_written_leaves_the_old_file(figure, tmp_path):
    (tmp_path / "a.png").write_text("old")
    figure.savefig = lambda *_, **__: 1 / 0
    with pytest.raises(ZeroDivisionError):
        save_figure(figure, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_missing_directory_is_found_before_there_is_anything_to_write(tmp_path):
    with pytest.raises(FileNotFoundError, match="no directory"):
        picture_path(tmp_path / "missing" / "a.png")


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_same_picture_is_the_same_file(figure, tmp_path, suffix):
    for name in "ab":
        save_figure(figure, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()


def test_a_picture_is_as_wide_as_a_papers_column(figure, tmp_path):
    save_figure(figure, tmp_path / "a.pdf")
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+)", (tmp_path / "a.pdf").read_bytes())
    assert float(box[1]) == pytest.approx(72 * WIDTHS["column"])
    assert Image.open(io.BytesIO(png_bytes(figure))).width == 990


def test_text_on_a_page_stays_text_and_is_no_mathematics(figure):
    assert "$name_with$ &amp; &lt;tags&gt;" in svg_text(figure)


def test_the_users_own_style_changes_nothing_and_is_left_as_it_was(tmp_path):
    with mpl.rc_context({"font.size": 30, "savefig.dpi": 10}):
        with drawing_style():
            assert mpl.rcParams["font.size"] == 7
        assert mpl.rcParams["font.size"] == 30


def test_without_matplotlib_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(InputError, match="pip install matplotlib"), drawing_style():
        pass
