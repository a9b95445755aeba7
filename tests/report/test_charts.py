import json
import re
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from signal_reid.report.charts import CONTRAST, DARK, LIGHT, PAGE_COLOURS, line_chart, page_colour
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
    assert 'stroke="currentColor"' in chart
    assert 'stroke="var(--series-0)"' in chart
    assert "#ffffff" not in chart


def test_a_chart_brings_no_style_sheet_and_no_metadata(curves):
    tags = {element.tag for element in ElementTree.fromstring(line_chart("loss", "", curves, "step")).iter()}
    assert not {"style", "metadata"} & tags


def test_a_chart_has_no_style_attributes_which_the_pages_policy_forbids(curves):
    root = ElementTree.fromstring(line_chart("loss", "", curves, "step"))
    assert [element.tag for element in root.iter() if "style" in element.attrib] == []


def test_a_run_has_its_colour_in_every_chart_and_its_name_whatever_it_is(curves):
    run = Curve("_a run with a name that is longer than half of the chart", [1.0, 2.0], [1.0, 2.0])
    charts = [
        line_chart("loss", "", chosen, "step", slots=slots) for chosen, slots in (([run], [3]), ([*curves, run], None))
    ]
    for chart in charts:
        line = next(line for line in ElementTree.fromstring(chart).iter("path") if "series-3" in line.get("stroke", ""))
        assert line.attrib["stroke-dasharray"]
    assert any(text.strip() == run.label for text in ElementTree.fromstring(charts[1]).itertext())


def test_percent_ticks_differ_where_values_are_small():
    chart = line_chart("retrieval", "", [Curve("mAP", [1.0, 2.0], [0.02, 0.1])], "epoch", percent=True)
    ticks = [text for text in ElementTree.fromstring(chart).itertext() if text.endswith("%")]
    assert len(set(ticks)) == len(ticks) > 2


def test_a_chart_tells_the_page_where_its_points_are(curves):
    root = ElementTree.fromstring(line_chart("loss", "", curves, "step"))
    hover = json.loads(root.attrib["data-hover"])
    assert (hover["label"], hover["x"]) == ("step", ["1", "2", "3"])
    assert hover["curves"][0] == ["a<b", ["0.1", "0.2", "0.3"]]
    line = next(path.attrib["d"] for path in root.iter("path") if path.attrib.get("stroke") == "var(--series-0)")
    drawn = [float(x) for x, _ in re.findall(r"([\d.]+) ([\d.]+)", line)]
    assert drawn == pytest.approx(hover["place"], abs=0.06)


@pytest.mark.parametrize("drawn", ["#000080", "#ffff66", "#808080", "#d55e01"])
def test_any_other_colour_stands_out_from_both_backgrounds(drawn):
    def luminance(colour):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    for found, background in zip(re.findall("#[0-9a-f]{6}", page_colour(drawn)), (LIGHT, DARK), strict=True):
        colour = [int(found[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        light, dark = sorted((luminance(colour), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= CONTRAST - 0.05  # its 256 levels are rounded


def test_curves_differ_in_more_than_colour(curves):
    chart = line_chart(
        "loss", "", [Curve(c.label, [float(i) for i in range(100)], [1.0] * 100) for c in curves], "step"
    )
    dashes = set(re.findall(r'stroke-dasharray="([^"]+)"', chart))
    assert len(dashes) == 2  # and the first is solid


def test_a_label_may_hold_what_no_figure_can():
    assert "a\ufffdb\ufffd" in line_chart("a", "", [Curve(n, [1.0], [0.0]) for n in ("a\x01b\udcff", "c")], "epoch")


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
