import os

import pytest
from PIL import Image

from signal_reid.data.checking import check_dataset
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import open_dataset


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310", "rgbn300", "wmveid863", "market1501mm"])
def test_a_sound_dataset_has_no_problems(name, write_dataset, tmp_path):
    assert check_dataset(name, write_dataset(name, tmp_path)) == []


def test_every_error_is_listed(rgbnt201, truncate):
    train, test = rgbnt201 / "train_171", rgbnt201 / "test"
    truncate(train / "RGB" / "000001_cam1_0_00.jpg")
    truncate(train / "TI" / "000001_cam1_0_00.jpg")
    (train / "NI" / "000002_cam1_0_00.jpg").unlink()
    truncate(test / "NI" / "000005_cam1_0_00.jpg")
    for modality in ("RGB", "NI", "TI"):
        (test / modality / "000004_cam1_0_00.jpg").rename(test / modality / "oddly_named.jpg")
    problems = [problem for problem in check_dataset("rgbnt201", rgbnt201) if problem.severity == "error"]
    assert {problem.path for problem in problems} == {
        train / "RGB" / "000001_cam1_0_00.jpg",
        train / "TI" / "000001_cam1_0_00.jpg",
        train / "NI" / "000002_cam1_0_00.jpg",
        test / "NI" / "000005_cam1_0_00.jpg",
        test / "RGB" / "oddly_named.jpg",
    }
    assert len(problems) == 5


def test_opening_raises_the_first_error_of_the_list(rgbnt201):
    (rgbnt201 / "train_171" / "NI" / "000002_cam1_0_00.jpg").unlink()
    (rgbnt201 / "train_171" / "TI" / "000003_cam1_0_00.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_dataset("rgbnt201", rgbnt201)
    assert str(caught.value) == str(check_dataset("rgbnt201", rgbnt201)[0])


def test_a_missing_dataset_is_one_problem(tmp_path):
    (problem,) = check_dataset("rgbnt100", tmp_path)
    assert problem.path == tmp_path
    assert "looked for bounding_box_train/" in problem.message


def test_other_splits_are_checked_although_one_is_missing(msvr310, truncate):
    (msvr310 / "query3").rename(msvr310 / "query")
    truncate(msvr310 / "bounding_box_test" / "0004" / "th" / "0004_s001_v0_000.jpg")
    errors = [problem.path.name for problem in check_dataset("msvr310", msvr310) if problem.severity == "error"]
    assert errors == ["query3", "0004_s001_v0_000.jpg"]


def test_a_composite_of_another_size_is_an_error(rgbnt100):
    path = rgbnt100 / "query" / "0004_c1_0000.jpg"
    Image.new("RGB", (256, 128)).save(path)
    (problem,) = check_dataset("rgbnt100", rgbnt100)
    assert (problem.path, problem.severity) == (path, "error")
    assert problem.message == "a composite must be 768x128 pixels, got 256x128"


def test_modalities_of_different_sizes_are_a_warning(rgbnt201):
    path = rgbnt201 / "train_171" / "TI" / "000001_cam1_0_00.jpg"
    Image.new("RGB", (20, 40)).save(path)
    (problem,) = check_dataset("rgbnt201", rgbnt201)
    assert problem.severity == "warning"
    assert "16x32, 20x40" in problem.message


def test_queries_that_nothing_can_match_are_a_warning(rgbnt100):
    for path in (rgbnt100 / "bounding_box_test").glob("0005_c2*"):
        path.unlink()
    (problem,) = check_dataset("rgbnt100", rgbnt100)
    assert problem.severity == "warning"
    assert "identity 5: 2 of 4 queries have no match in the gallery from another camera" in problem.message


def test_scenes_decide_what_matches_where_the_dataset_has_them(msvr310):
    folder = msvr310 / "bounding_box_test" / "0006"
    for path in folder.glob("*/0006_s001_*"):
        path.unlink()
    (problem,) = check_dataset("msvr310", msvr310)
    assert "identity 6: 2 of 4 queries have no match in the gallery from another scene" in problem.message


def test_an_identity_both_trained_on_and_tested_with_is_a_warning(rgbnt100):
    for path in (rgbnt100 / "bounding_box_train").glob("0003_*"):
        path.rename(path.with_name(path.name.replace("0003", "0004")))
    (problem,) = check_dataset("rgbnt100", rgbnt100)
    assert problem.severity == "warning"
    assert "1 identities are also in query or gallery (4)" in problem.message


def test_images_named_for_another_identity_are_a_warning(msvr310):
    (msvr310 / "bounding_box_train" / "0003").rename(msvr310 / "bounding_box_train" / "0007")
    (problem,) = check_dataset("msvr310", msvr310)
    assert problem.severity == "warning"
    assert problem.message == "holds images named for identity 0003"


def test_without_decoding_images_are_not_read(rgbnt201, truncate):
    truncate(rgbnt201 / "train_171" / "RGB" / "000001_cam1_0_00.jpg")
    assert check_dataset("rgbnt201", rgbnt201, decode=False) == []


def test_reading_reports_progress(rgbnt201):
    seen: list[tuple[int, int]] = []
    check_dataset("rgbnt201", rgbnt201, progress=lambda *done: seen.append(done))
    assert seen[-1] == (24, 24)


@pytest.mark.parametrize(
    ("odd", "what"),
    [(b"000001_cam1_caf\xe9.jpg", "is not UTF-8"), (b"000001_cam1_\n\x1b[2J.jpg", "has control characters")],
)
def test_names_that_cannot_be_shown_are_warnings_and_are_shown_escaped(odd, what, rgbnt201):
    for modality in ("RGB", "NI", "TI"):
        folder = os.fsencode(rgbnt201 / "train_171" / modality)
        os.rename(os.path.join(folder, b"000001_cam1_0_00.jpg"), os.path.join(folder, odd))
    problems = check_dataset("rgbnt201", rgbnt201)
    assert [problem.severity for problem in problems] == ["warning"] * 3
    assert all(problem.message == f"name {what}" for problem in problems)
    assert all(str(problem).isprintable() for problem in problems)
