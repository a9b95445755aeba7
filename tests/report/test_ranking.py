import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from signal_reid.data import Dataset
from signal_reid.evaluation import FeatureSet, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.figures import svg_text
from signal_reid.report import QueryResult, Ranking
from signal_reid.report.contents import camera_caption
from signal_reid.report.embedding import draw_map, embedding_map, map_picture
from signal_reid.report.ranking import Wanted, check_camera, choose, draw_ranked, ranking_table
from signal_reid.runtime.errors import InputError


def results(*precisions, names=None):
    return [
        QueryResult(names[i] if names else f"dir/q{i}.jpg", i % 3, f"cam{i % 2 + 1}", precision, ())
        for i, precision in enumerate(precisions)
    ]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (Wanted(order="worst", count=2), [1, 4]),
        (Wanted(order="best", count=3), [2, 0, 3]),
        (Wanted(order="spread", count=3), [2, 3, 1]),
        (Wanted(order="worst", camera="cam1", count=9), [4, 0, 2]),
        (Wanted(order="best", identity=0, count=9), [0, 3]),
        (Wanted(names=["q5", "dir/q1.jpg", "q0.jpg"]), [5, 1, 0]),
        (Wanted(order="disagreement", count=2), [3, 0]),
    ],
)
def test_the_queries_that_are_asked_for_are_chosen(wanted, chosen):
    these = results(0.9, 0.1, 0.95, 0.5, 0.3, float("nan"))
    those = results(0.6, 0.1, 0.90, 0.9, 0.3, float("nan"))
    assert choose(these, wanted, those) == chosen


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted(names=["q9"]), "no query is named 'q9'; such as dir/q0.jpg, dir/q1.jpg"),
        (
            Wanted(camera="cam7", identity=3),
            "there is no query of camera cam7 and identity 3 with a match in the gallery",
        ),
        (Wanted(order="disagreement"), "needs the weights of another run: --against FILE"),
    ],
)
def test_what_cannot_be_chosen_is_said(wanted, message):
    with pytest.raises(InputError, match=re.escape(message)):
        choose(results(0.9, 0.1), wanted)


def test_runs_that_agree_have_nothing_to_show():
    with pytest.raises(InputError, match="no query on which the runs disagree"):
        choose(results(0.9, 0.1), Wanted(order="disagreement"), results(0.9, 0.1))


def test_a_name_of_two_queries_is_refused():
    with pytest.raises(InputError, match=r"2 queries are named 'q': a/q.jpg, b/q.jpg"):
        choose(results(0.9, 0.1, names=["a/q.jpg", "b/q.jpg"]), Wanted(names=["q"]))


@pytest.fixture
def ranking():
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(24, 4, generator=generator), torch.arange(24)
    items = FeatureSet(features + torch.nn.functional.one_hot(labels % 4), labels % 4, labels // 4 % 3)
    precision = retrieval_metrics(items, items).average_precision
    names = [f"{i}.jpg" for i in range(24)]
    return Ranking(items, items, rank_gallery(items, items, top=23), precision, match_ranks(items, items), names, names)


def test_the_ranking_drawn_is_the_one_measured(ranking, triplet):
    lists = ranking.lists([0, 5, 11], lambda i: triplet(i), triplet)
    figure = draw_ranked([("", ranked) for ranked in lists], "page")
    assert len(figure.axes) == sum(1 + len(ranked.results) for ranked in lists)
    drawn = iter(figure.axes)
    for query, ranked in zip([0, 5, 11], lists, strict=True):
        assert next(drawn).get_title() == "query"
        titles = [next(drawn).get_title() for _ in ranked.results]
        assert [title.split()[0] for title in titles] == [str(rank) for rank in range(1, len(titles) + 1)]
        right = [rank for rank, title in enumerate(titles, 1) if title.endswith("✓")]
        assert right == list(ranked.match_ranks)
        recomputed = np.mean([k / rank for k, rank in enumerate(right, 1)])
        assert recomputed == pytest.approx(ranking.average_precision[query], rel=1e-12)


def test_right_and_wrong_items_differ_in_line_and_sign_as_well_as_colour(ranking, triplet):
    (ranked,) = ranking.lists([0], triplet, triplet)
    axes = draw_ranked([("", ranked)]).axes[1:]
    lines = {
        (item.correct, place.get_title()[-1], str(place.spines["left"].get_linestyle()))
        for item, place in zip(ranked.results, axes, strict=True)
    }
    assert {(right, sign) for right, sign, _ in lines} == {(True, "✓"), (False, "✗")}
    assert len({line for _, _, line in lines}) == 2


def test_a_name_is_drawn_whatever_it_holds(ranking, triplet):
    (ranked,) = ranking.lists([0], triplet, triplet)
    figure = draw_ranked([("", replace(ranked, name="a\x01\udcff$_{x}$"))])
    assert "a\ufffd\ufffd$_{x}$" in svg_text(figure)


def test_all_modalities_are_drawn_below_each_other(ranking, triplet):
    images = torch.cat([triplet(level, modalities=1) for level in (10, 100, 200)])
    (ranked,) = ranking.lists([0], lambda i: images, triplet)
    drawn = draw_ranked([("", ranked)]).axes[0].images[0].get_array()
    assert [int(level) for level in drawn[:, 0, 0]] == [10] * 8 + [255] + [100] * 8 + [255] + [200] * 8


def test_two_runs_are_told_apart_in_the_table(ranking, triplet):
    (ranked,) = ranking.lists([0], triplet, triplet)
    table = ranking_table([("a", ranked), ("b", ranked)])
    assert table.header[0] == "run"
    assert [row[0] for row in table.rows] == ["a", "b"]


def test_cameras_are_named_wherever_a_ranking_is_shown(ranking, triplet):
    named = replace(ranking, camera_name=lambda number: f"gate{number}")
    wanted = [f"gate{number}" for number in ranking.query.cameras.tolist()]
    assert [result.camera for result in named.results()] == wanted
    lists = named.lists([0, 5], triplet, triplet)
    assert [found.camera for found in lists] == [wanted[0], wanted[5]]
    assert {item.camera for found in lists for item in found.results} == {"gate0", "gate1", "gate2"}
    figure = draw_ranked([("", found) for found in lists], "page")
    assert figure.axes[0].get_xlabel() == "id 0\ngate0"
    assert [row[2] for row in ranking_table([("", found) for found in lists]).rows] == [wanted[0], wanted[5]]


def test_cameras_are_named_on_the_map(ranking):
    found, name = embedding_map(ranking.gallery), "gate{}".format
    legend = draw_map(found, camera_name=name).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["gate0", "gate1", "gate2"]
    assert {row[1] for row in map_picture(found, name).tables[0].rows} == {"gate0", "gate1", "gate2"}


def test_a_camera_is_asked_for_by_its_name_alone():
    dataset = Dataset("rgbnt201", Path(), [], [], [], (), {0: "cam1", 1: "cam2"})
    check_camera(dataset, "cam2")
    check_camera(dataset, None)
    for wrong in ("1", "0", "Cam1"):
        with pytest.raises(InputError, match=f"camera must be one of cam1, cam2; got '{wrong}'"):
            check_camera(dataset, wrong)
    with pytest.raises(InputError, match="camera needs cameras, and list knows none; got 'cam1'"):
        check_camera(replace(dataset, name="list", camera_names={}), "cam1")


@pytest.mark.parametrize(
    ("name", "caption"),
    [("cam1", "cam1"), ("3", "cam 3"), ("n/a", "cam n/a"), ("north entrance, left", "north ent…left")],
)
def test_a_caption_says_that_a_number_is_a_camera(name, caption):
    assert camera_caption(name) == caption
