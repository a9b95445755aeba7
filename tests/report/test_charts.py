from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from signal_reid.report.charts import PAGE_COLOURS, line_chart
from signal_reid.report.history import Curve


@pytest.fixture
def curves():
    return [Curve(name, [1.0, 2.0, 3.0], [i + 0.1, i + 0.2, i + 0.3]) for i, name in enumerate(["a<b", "c", "d"])]


def test_a_chart_is_one_element_with_its_labels_as_text(curves):
    root = ElementTree.fromstring(line_chart("loss", "what it shows", curves, "step"))
    assert root.tag == "svg"
    assert root.attrib["aria-label"] == "what it shows"
    assert {"a<b", "c", "d", "step"} <= set(root.itertext())


def test_a_chart_takes_the_colours_of_the_page(curves):
    chart = line_chart("loss", "", curves, "step", first_is_total=True)
    for drawn in PAGE_COLOURS:
        assert drawn not in chart
    assert "stroke: currentColor" in chart
    assert "stroke: var(--series-0)" in chart
    assert "#ffffff" not in chart


def test_a_chart_brings_no_style_sheet_and_no_metadata(curves):
    tags = {element.tag for element in ElementTree.fromstring(line_chart("loss", "", curves, "step")).iter()}
    assert not {"style", "metadata"} & tags


def test_curves_differ_in_more_than_colour(curves):
    chart = line_chart(
        "loss", "", [Curve(c.label, [float(i) for i in range(100)], [1.0] * 100) for c in curves], "step"
    )
    dashes = {part.partition(";")[0] for part in chart.split("stroke-dasharray:")[1:]}
    assert len(dashes) == 2  # and the first is solid


def test_one_point_and_zeros_are_drawn():
    assert line_chart("a", "", [Curve("mAP", [1.0], [0.0])], "epoch", percent=True).startswith("<svg")


def test_a_users_style_does_not_matter(curves):
    plain = line_chart("loss", "", curves, "step")
    with mpl.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert line_chart("loss", "", curves, "step") == plain


def test_drawing_leaves_matplotlibs_settings_alone(curves):
    before = dict(mpl.rcParams)
    line_chart("loss", "", curves, "step")
    assert dict(mpl.rcParams) == before
