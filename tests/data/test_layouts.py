import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from signal_reid.data.checking import check_dataset
from signal_reid.data.decoding import decode
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import ImageSource, Options, find_layout, open_dataset
from signal_reid.data.layouts.market1501mm import parse as market1501mm_file
from signal_reid.data.layouts.msvr310 import parse as msvr310_file
from signal_reid.data.layouts.rgbnt100 import parse as rgbnt100_file
from signal_reid.data.layouts.rgbnt201 import parse as rgbnt201_file
from signal_reid.data.layouts.wmveid863 import parse as wmveid863_file
from signal_reid.data.synthetic import synthesize

NAMES = ("rgbnt201", "rgbnt100", "msvr310", "rgbn300", "wmveid863", "market1501mm")


@pytest.mark.parametrize("name", NAMES)
def test_every_sample_is_found_in_each_split(name, write_dataset, tmp_path):
    dataset = open_dataset(name, write_dataset(name, tmp_path))
    assert [len(split) for split in (dataset.train, dataset.query, dataset.gallery)] == [12, 12, 12]
    assert dataset.num_train_identities == 3
    assert {sample.identity for sample in dataset.gallery} == {4, 5, 6}


@pytest.mark.parametrize("name", NAMES)
def test_samples_are_sorted_and_uniquely_named(name, write_dataset, tmp_path):
    dataset = open_dataset(name, write_dataset(name, tmp_path))
    for split in (dataset.train, dataset.query, dataset.gallery):
        names = [sample.name for sample in split]
        assert names == sorted(set(names))


@pytest.mark.parametrize("name", NAMES)
def test_directory_order_changes_nothing(name, write_dataset, tmp_path, monkeypatch):
    root = write_dataset(name, tmp_path, reverse=True)
    expected = open_dataset(name, root)
    scandir, listdir = os.scandir, os.listdir

    class Reversed(list):
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

    monkeypatch.setattr(os, "scandir", lambda path: Reversed(reversed(list(scandir(path)))))
    monkeypatch.setattr(os, "listdir", lambda path: list(reversed(listdir(path))))
    assert open_dataset(name, root) == expected


def test_rgbnt201_reads_identity_camera_and_pairs_modalities_by_name(rgbnt201):
    sample = open_dataset("rgbnt201", rgbnt201).train[2]
    assert (sample.identity, sample.camera, sample.scene, sample.name) == (1, 1, -1, "000001_cam2_0_00.jpg")
    folder = rgbnt201 / "train_171"
    assert sample.sources == tuple(ImageSource(folder / modality / sample.name) for modality in ("RGB", "NI", "TI"))


def test_rgbnt201_test_is_query_and_gallery(rgbnt201):
    dataset = open_dataset("rgbnt201", rgbnt201)
    assert dataset.query == dataset.gallery
    samples, query, gallery = dataset.evaluation_samples()
    assert samples == dataset.query
    assert query == gallery == list(range(12))


def test_rgbnt100_cuts_composites_from_left_to_right(rgbnt100):
    sample = open_dataset("rgbnt100", rgbnt100).train[-1]
    assert (sample.identity, sample.camera, sample.name) == (3, 1, "0003_c2_0001.jpg")
    assert [source.box for source in sample.sources] == [(0, 0, 256, 128), (256, 0, 512, 128), (512, 0, 768, 128)]


def test_rgbnt100_leaves_junk_out(rgbnt100):
    (rgbnt100 / "query" / "-1_c1_0000.jpg").write_bytes(b"")
    assert len(open_dataset("rgbnt100", rgbnt100).query) == 12


def test_rgbn300_is_two_modalities_of_one_composite(write_dataset, tmp_path):
    dataset = open_dataset("rgbn300", write_dataset("rgbn300", tmp_path))
    assert dataset.modalities == ("RGB", "NI")
    assert [source.box for source in dataset.train[0].sources] == [(0, 0, 256, 128), (256, 0, 512, 128)]


def test_wmveid863_reads_view_and_scene_and_leaves_unpaired_files_out(write_dataset, tmp_path):
    root = write_dataset("wmveid863", tmp_path)
    (root / "train" / "0003" / "th" / "v2_n0_s001_001.jpg").unlink()
    dataset = open_dataset("wmveid863", root)
    assert len(dataset.train) == 11
    sample = dataset.query[-1]
    assert (sample.identity, sample.camera, sample.scene, sample.name) == (6, 2, 1, "0006/v2_n0_s001_001.jpg")
    with pytest.raises(DataError, match=r"th/v2_n0_s001_001.jpg: missing modality"):
        open_dataset("wmveid863", root, Options(unpaired="error"))


def test_market1501mm_drops_junk_and_keeps_distractors(write_dataset, tmp_path):
    root = write_dataset("market1501mm", tmp_path)
    for modality in ("RGB", "NI", "TI"):
        folder = root / "gallery" / modality
        (folder / "0004_c1s1_000000_00.jpg").rename(folder / "-1_c1s1_000000_00.jpg")
        (folder / "0004_c1s1_000001_00.jpg").rename(folder / "0000_c3s1_000001_00.jpg")
    dataset = open_dataset("market1501mm", root)
    assert [(s.identity, s.camera) for s in dataset.gallery[:2]] == [(0, 2), (4, 1)]
    assert len(dataset.gallery) == 11


def test_a_list_of_queries_is_all_that_is_asked(rgbnt201, tmp_path):
    """RGBNT201's original protocol has fewer probes than images in its test split."""
    listed = tmp_path / "queries.txt"
    listed.write_text("000004_cam1_0_00.jpg\n\n000006_cam2_0_01.jpg\n")
    dataset = open_dataset("rgbnt201", rgbnt201, Options(queries=str(listed)))
    assert [sample.name for sample in dataset.query] == ["000004_cam1_0_00.jpg", "000006_cam2_0_01.jpg"]
    assert len(dataset.gallery) == 12
    listed.write_text("000004_cam1_0_00.jpg\n000009_cam1_0_00.jpg\n")
    with pytest.raises(DataError, match=r"line 2: no sample of query is named '000009_cam1_0_00.jpg'"):
        open_dataset("rgbnt201", rgbnt201, Options(queries=str(listed)))


@pytest.mark.parametrize("name", NAMES)
def test_one_modality_of_each_layout_can_be_had_alone(name, write_dataset, tmp_path):
    root = write_dataset(name, tmp_path)
    whole, alone = open_dataset(name, root), open_dataset(name, root, Options(modalities=("NI",)))
    assert torch.equal(decode(whole.query[1], (8, 8))[1:2], decode(alone.query[1], (8, 8)))
    samples = (*whole.train, *whole.query, *whole.gallery)
    kept, others = ({s.sources[i].path.parent for s in samples for i in places} for places in ((1,), (0, -1)))
    for folder in others - kept:
        shutil.rmtree(folder)
    assert open_dataset(name, root, Options(modalities=("NI",))) == alone
    if others - kept:
        with pytest.raises(FileNotFoundError, match="missing directory of a modality"):
            open_dataset(name, root)


def test_modalities_pair_whatever_their_suffixes_and_case(rgbnt201):
    folder = rgbnt201 / "train_171"
    Image.open(folder / "TI" / "000001_cam1_0_00.jpg").save(folder / "TI" / "000001_Cam1_0_00.PNG")
    (folder / "TI" / "000001_cam1_0_00.jpg").unlink()
    sample = open_dataset("rgbnt201", rgbnt201).train[0]
    assert [source.path.name for source in sample.sources] == ["000001_cam1_0_00.jpg"] * 2 + ["000001_Cam1_0_00.PNG"]


def test_msvr310_reads_identity_scene_and_view(msvr310):
    sample = open_dataset("msvr310", msvr310).train[-1]
    assert (sample.identity, sample.scene, sample.camera) == (3, 2, 1)
    assert sample.name == "0003/0003_s002_v1_000.jpg"
    assert [source.path.parent.name for source in sample.sources] == ["vis", "ni", "th"]


def test_query_and_gallery_of_different_files_are_both_evaluated(msvr310):
    dataset = open_dataset("msvr310", msvr310)
    samples, query, gallery = dataset.evaluation_samples()
    assert [samples[i] for i in query] == dataset.query
    assert [samples[i] for i in gallery] == dataset.gallery
    assert len(samples) == 24


def test_labels_are_contiguous_in_the_order_of_identities(write_dataset, tmp_path):
    dataset = open_dataset("rgbnt100", write_dataset("rgbnt100", tmp_path))
    assert dataset.train_labels == {1: 0, 2: 1, 3: 2}


def test_cameras_are_counted_over_all_splits(rgbnt201):
    for modality in ("RGB", "NI", "TI"):
        folder = rgbnt201 / "test" / modality
        (folder / "000004_cam1_0_00.jpg").rename(folder / "000004_cam4_0_00.jpg")
    assert open_dataset("rgbnt201", rgbnt201).num_cameras == 4


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("rgbnt201", "."),
        ("rgbnt201", "RGBNT201"),
        ("rgbnt201", "data/RGBNT201"),
        ("rgbnt201", "512/data/RGBNT201"),
        ("rgbnt100", "RGBNT100/rgbir"),
        ("rgbnt100", "rgbir"),
        ("rgbnt100", "512/data/RGBNT100/rgbir"),
        ("msvr310", "MSVR310"),
        ("msvr310", "512/data/MSVR310"),
        ("rgbn300", "RGBN300/rgbir"),
        ("wmveid863", "WMVeID863"),
        ("market1501mm", "Market1501-MM"),
    ],
)
def test_the_root_may_be_a_directory_above_the_dataset(name, folder, write_dataset, tmp_path):
    root = write_dataset(name, tmp_path / folder)
    assert open_dataset(name, tmp_path).root == root


def test_a_stray_test_directory_does_not_hide_the_dataset(rgbnt201):
    (rgbnt201.parent / "test").mkdir()
    assert open_dataset("rgbnt201", rgbnt201.parent).root == rgbnt201


def test_authors_name_of_a_dataset_is_accepted(rgbnt201):
    assert open_dataset("RGBNT201", rgbnt201).name == "rgbnt201"


def test_unknown_dataset_is_refused():
    with pytest.raises(DataError, match=r"must be one of .*rgbnt201.*, got 'market'"):
        open_dataset("market", ".")


def test_missing_root_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        open_dataset("rgbnt201", tmp_path / "nowhere")


def test_a_root_without_the_dataset_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"looked for train_171/ in .*/RGBNT201, .*/512/data/RGBNT201"):
        open_dataset("rgbnt201", tmp_path)


def test_missing_split_is_named(msvr310):
    (msvr310 / "query3").rename(msvr310 / "other")
    with pytest.raises(FileNotFoundError, match=r"query3: missing directory \(query of msvr310\)"):
        open_dataset("msvr310", msvr310)


@pytest.mark.parametrize("modality", ["RGB", "NI", "TI"])
def test_missing_modality_is_named(modality, rgbnt201):
    (rgbnt201 / "train_171" / modality / "000002_cam1_0_01.jpg").unlink()
    with pytest.raises(DataError, match=rf"train_171/{modality}/000002_cam1_0_01.jpg: missing modality"):
        open_dataset("rgbnt201", rgbnt201)


def test_missing_directory_of_a_modality_is_named(msvr310):
    (msvr310 / "bounding_box_train" / "0002" / "th").rename(msvr310 / "th")
    with pytest.raises(FileNotFoundError, match="0002/th: missing directory"):
        open_dataset("msvr310", msvr310)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("rgbnt201", "train_171/{RGB,NI,TI}/person_7.jpg"),
        ("rgbnt201", "train_171/{RGB,NI,TI}/000001_cam0_0_00.jpg"),
        ("rgbnt100", "query/car.jpg"),
        ("msvr310", "bounding_box_test/0004/{vis,ni,th}/0004_s001_v8_000.jpg"),
    ],
)
def test_a_name_that_does_not_parse_is_named_with_the_pattern(name, file, write_dataset, tmp_path):
    root = write_dataset(name, tmp_path)
    head, _, rest = file.partition("{")
    folders, _, tail = rest.partition("}")
    for path in [head + folder + tail for folder in folders.split(",")] if rest else [file]:
        Image.new("RGB", (8, 8)).save(root / path)
    with pytest.raises(DataError, match=f"{Path(file).name}: name does not parse, expected "):
        open_dataset(name, root)


def test_empty_split_is_refused(rgbnt100):
    for path in (rgbnt100 / "query").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"query: no images .* for query of rgbnt100"):
        open_dataset("rgbnt100", rgbnt100)


def test_one_training_identity_is_refused(rgbnt100):
    for path in (rgbnt100 / "bounding_box_train").iterdir():
        if not path.name.startswith("0001"):
            path.unlink()
    with pytest.raises(DataError, match="needs at least 2 identities, got 1"):
        open_dataset("rgbnt100", rgbnt100)


def test_files_that_are_no_images_are_passed_over(rgbnt201):
    (rgbnt201 / "train_171" / "RGB" / "Thumbs.db").write_bytes(b"")
    (rgbnt201 / "train_171" / "RGB" / "._000001_cam1_0_00.jpg").write_bytes(b"")
    assert len(open_dataset("rgbnt201", rgbnt201).train) == 12


@pytest.mark.parametrize("name", [*NAMES, "manifest"])
def test_the_synthetic_twin_is_a_sound_data_set_of_its_layout(name, tmp_path):
    counts = {"train_identities": 2, "test_identities": 1, "images_per_identity": 4, "cameras": 2}
    size = None if name in ("rgbnt100", "rgbn300") else (32, 32)
    root = synthesize(name, tmp_path / "made", **counts, image_size=size)
    root = root / "manifest.csv" if name == "manifest" else root
    planted = (
        "without a counterpart" if name == "wmveid863" else "nothing"
    )  # its published files are not all paired either
    assert [problem for problem in check_dataset(name, root) if planted not in problem.message] == []
    dataset = open_dataset(name, root)
    assert len(dataset.train) == 8
    assert {sample.identity for sample in (*dataset.query, *dataset.gallery)} == {3}


@pytest.mark.parametrize(
    ("name", "labels", "camera"),
    [
        ("rgbnt201", rgbnt201_file("000288_cam1_0_09.jpg"), "cam1"),
        ("rgbnt100", rgbnt100_file("0001_c3_0005.jpg"), "c3"),
        ("rgbn300", rgbnt100_file("0001_c12_0005.jpg"), "c12"),
        ("market1501mm", market1501mm_file("0002_c6s1_000451_03.jpg"), "c6"),
        ("msvr310", msvr310_file("0001_s002_v0_004.jpg"), "v0"),
        ("wmveid863", wmveid863_file("v7_n0_s003_001.jpg", 1), "v7"),
    ],
)
def test_a_camera_is_called_what_the_file_names_call_it(name, labels, camera):
    assert find_layout(name).camera_name(labels.camera) == camera


def test_a_data_set_names_the_cameras_of_its_samples(rgbnt201):
    dataset = open_dataset("rgbnt201", rgbnt201)
    for sample in (*dataset.train, *dataset.query, *dataset.gallery):
        assert f"_{dataset.camera_name(sample.camera)}_" in sample.name
    assert dataset.cameras_in_words == f"{dataset.num_cameras} cameras ({', '.join(dataset.camera_names.values())})"
    assert dataset.camera_name(-1) == "n/a"
