import base64
import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from signal_reid.report import Headline, RankedItem, RankedList, RunReport, write_report


def test_every_number_is_on_the_page(page, report):
    text = page(report).text
    for number in ("12.3", "11.1", "22.2", "33.3", "80.3", "85.2", "91.1", "94.0"):  # results
        assert number in text
    for number in ("5.125", "2.562", "3.00e-04", "1.50e-04", "201.5", "40.0%", "86.4%", "25.0%"):  # epochs
        assert number in text
    for number in ("80.6", "0.250", "0.375", "0.500", "id 99", "Identity 7, camera cam6", "000007_cam6.jpg"):  # lists
        assert number in text
    assert "3951" in text
    assert "2.7.0" in text


def test_the_page_refers_to_nothing_outside(page, report):
    result = page(report)
    assert "http:" not in result.source
    assert "https:" not in result.source
    for _, attributes in result.elements:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/jpeg;base64,", "data:text/csv;"))
    assert not {"link", "iframe"} & {tag for tag, _ in result.elements}
    assert "@import" not in result.source


def test_text_is_escaped(page, report, triplet):
    hostile = '<script>alert("x")</script>'
    lists = [RankedList(triplet(), 1, "cam1", 1.0, [], name=hostile)]
    result = page(
        RunReport(
            hostile, [(hostile, hostile)], [Headline(hostile, 0, 0, 0, 0)], [], lists, hostile, [(hostile, hostile)]
        )
    )
    assert result.source.count("<script") == 1
    assert result.text.count(hostile) == 10


def test_right_and_wrong_results_are_marked_by_class_sign_and_word(page, report):
    result = page(report)
    marks = [attributes["class"].split()[-1] for tag, attributes in result.having_class("item") if tag == "li"]
    assert marks == ["right", "wrong", "right"]
    # The legend shows each sign once more.
    assert (result.text.count("✓"), result.text.count("✗")) == (3, 2)
    assert (result.text.count("✓right"), result.text.count("✗wrong")) == (3, 2)


def test_every_image_is_named_by_modality_and_rank(page, report):
    alternatives = [attributes["alt"] for tag, attributes in page(report).elements if tag == "img"]
    modalities = ("RGB", "NI", "TI")
    places = ("the query", "rank 1", "rank 2", "rank 3")
    listed = [f"{modality} of {place}" for place in places for modality in modalities]
    assert alternatives == [*listed, *(f"{modality}: Tokens" for modality in modalities)]


def test_images_are_the_ones_given_no_larger_than_a_thumbnail(page, triplet):
    images = torch.cat([triplet(level, height=512, width=256, modalities=1) for level in (30, 120, 240)])
    result = page(RunReport("a", ranked_lists=[RankedList(images, 1, "cam1", 1.0, [])]))
    sources = [attributes["src"] for tag, attributes in result.elements if tag == "img"]
    pictures = [Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) for source in sources]
    assert [picture.size for picture in pictures] == [(128, 256)] * 3
    assert [round(np.asarray(picture).mean()) for picture in pictures] == [30, 120, 240]


def test_other_modalities_have_their_names(page, triplet):
    ranked = RankedList(triplet(modalities=2), 1, "cam1", 1.0, [])
    result = page(RunReport("a", ranked_lists=[ranked], modalities=("visible", "thermal")))
    assert [a["alt"] for tag, a in result.elements if tag == "img"] == ["visible of the query", "thermal of the query"]


def test_charts_are_described_and_ids_unique(page, report):
    result = page(report)
    charts = [attributes for tag, attributes in result.elements if tag == "svg" and "role" in attributes]
    assert [chart["role"] for chart in charts] == ["img"] * 3
    assert "ends at 1.5" in charts[0]["aria-label"]
    assert "mAP at best 80.0 percent, R-1 at best 86.4 percent; best epoch: 2" in charts[1]["aria-label"]
    assert "at most 0.0003" in charts[2]["aria-label"]
    ids = Counter(attributes["id"] for _, attributes in result.elements if "id" in attributes)
    assert set(ids.values()) == {1}


def test_accuracy_and_the_parts_of_losses_have_charts_and_the_best_and_last_epoch_marks(page, history):
    for row, (accuracy, mAP) in zip(history[2::4], ((0.25, 0.9), (0.75, 0.8)), strict=True):
        row |= {"head_0.identity": 3.5, "head_0.accuracy": accuracy}
        history[history.index(row) + 1]["mAP"] = mAP
    result = page(RunReport("a", history=history))
    charts = [attributes["aria-label"] for tag, attributes in result.elements if tag == "svg" and "role" in attributes]
    assert charts[1] == "Identity loss by epoch; at the end: head 0 3.5."
    assert charts[2] == "Accuracy on the training batches by epoch; at the end: head 0 75.0%."
    assert charts[3].endswith("R-1 at best 86.4 percent; best epoch: 1; last epoch: 2.")
    for text in ("best epoch: 1", "last epoch: 2", "1 (best)", "75%"):
        assert text in result.text


def test_references_inside_the_page_have_their_target(page, report):
    result = page(report)
    ids = {attributes.get("id") for _, attributes in result.elements}
    for _, attributes in result.elements:
        references = [attributes[name] for name in ("aria-labelledby",) if name in attributes]
        references += [attributes["href"][1:] for name in ("href",) if attributes.get(name, "").startswith("#")]
        references += [
            value.removeprefix("url(#").removesuffix(")")
            for value in attributes.values()
            if value and value.startswith("url(")
        ]
        assert set(references) <= ids


def test_tables_have_headers(page, report):
    result = page(report)
    scopes = Counter(attributes.get("scope") for tag, attributes in result.elements if tag == "th")
    assert None not in scopes
    assert Counter(tag for tag, _ in result.elements)["caption"] == Counter(tag for tag, _ in result.elements)["table"]


def test_empty_parts_are_left_out(page):
    result = page(RunReport("nothing yet"))
    assert result.text.split()[:2] == ["nothing", "yet"]
    assert not {"table", "svg", "img", "section", "nav", "form"} & {tag for tag, _ in result.elements}


def test_an_unknown_average_precision_is_said_to_be(page, triplet):
    assert (
        "average precision n/a"
        in page(RunReport("a", ranked_lists=[RankedList(triplet(), 1, "cam1", math.nan, [])])).text
    )


def test_the_same_report_is_the_same_file(page, report):
    assert page(report).source == page(report).source


def test_writing_leaves_only_the_report(page, report, tmp_path):
    page(report)
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_a_missing_directory_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_report(tmp_path / "nowhere" / "report.html", RunReport("a"))


def test_images_of_another_kind_are_refused(triplet):
    with pytest.raises(
        ValueError, match=r"images must be uint8 \(M, 3, H, W\), got torch.float32 of shape \(3, 3, 8, 4\)"
    ):
        RankedItem(triplet().float(), 1, "cam1", 0.0, True)
    with pytest.raises(ValueError, match=r"images must be uint8 \(M, 3, H, W\)"):
        RankedList(triplet()[0], 1, "cam1", 1.0, [])


def test_another_number_of_images_than_modalities_is_refused(triplet):
    with pytest.raises(ValueError, match="images must have one for each of RGB, NI, TI, got 2"):
        RunReport("a", ranked_lists=[RankedList(triplet(modalities=2), 1, "cam1", 1.0, [])])
