"""A manifest: what it may say, everything that can be wrong with it by line, and how it is written and split."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from signal_reid.config import ConfigError, load_config
from signal_reid.data import check_dataset, decode, open_dataset, tables
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import Dataset, Options
from signal_reid.data.manifests import split_manifest, write_manifest
from signal_reid.data.tables import TableError, read_table, write_table

PEOPLE = {"train": ("ada", "bob"), "query": ("cid",), "gallery": ("cid", "dan")}


@pytest.fixture
def manifest(tmp_path):
    """Writes a manifest of these modalities and these lines; every image is there."""

    def write(*lines, modalities=("RGB", "TI"), columns="split,identity,camera", name="list.csv"):
        for path in {cell for line in lines for cell in line.split(",")[columns.count(",") + 1 :] if cell}:
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            if "absent" not in path:
                Image.new("RGB", (8, 8), (len(path), 0, 0)).save(tmp_path / path)
        (tmp_path / name).write_text("\n".join([f"{columns},{','.join(modalities)}", *lines, ""]))
        return tmp_path / name

    return write


@pytest.fixture
def people(manifest):
    lines = [
        f"{split},{name},{split},rgb/{split}_{name}.png,heat/{split}_{name}.png"
        for split, names in PEOPLE.items()
        for name in names
    ]
    return manifest(*lines)


def test_a_line_is_a_sample_whose_paths_are_told_from_the_file(people):
    dataset = open_dataset("manifest", people)
    assert dataset.modalities == ("RGB", "TI")
    assert [sample.identity for sample in (*dataset.train, *dataset.query, *dataset.gallery)] == [0, 1, 2, 2, 3]
    sample = dataset.query[0]
    assert (sample.name, sample.camera, sample.scene) == ("rgb/query_cid.png", 1, -1)
    assert [source.path for source in sample.sources] == [
        people.parent / folder / "query_cid.png" for folder in ("rgb", "heat")
    ]
    assert check_dataset("manifest", people) == []


def test_test_is_query_and_gallery(manifest):
    lines = [
        f"{split},{identity},1,{identity}{n}.png"
        for split, identity in (("train", 1), ("train", 2), ("test", 3))
        for n in "ab"
    ]
    dataset = open_dataset("manifest", manifest(*lines, modalities=["colour"]))
    assert dataset.query == dataset.gallery
    assert len(dataset.query) == 2


def test_modalities_are_chosen_and_ordered_by_name(manifest):
    lines = [f"{s},{i},1,{i}r.png,{i}n.png,{i}t.png,{i}d.png" for s, i in (("train", 1), ("train", 2), ("test", 3))]
    path = manifest(*lines, modalities=["RGB", "NI", "TI", "depth"])
    assert len(open_dataset("manifest", path).train[0].sources) == 4
    sample = open_dataset("manifest", path, Options(modalities=("depth", "RGB"))).train[0]
    assert [source.path.name for source in sample.sources] == ["1d.png", "1r.png"]
    with pytest.raises(DataError, match=r"data.modalities must be of RGB, NI, TI, depth, got 'UV'"):
        open_dataset("manifest", path, Options(modalities=("RGB", "UV")))


def test_a_modality_that_is_not_asked_for_may_be_absent(manifest):
    path = manifest("train,1,1,a.png,", "train,2,1,b.png,absent.png", "test,3,1,c.png,c2.png")
    assert len(open_dataset("manifest", path, Options(modalities=("RGB",))).train) == 2
    with pytest.raises(DataError, match="line 2: TI is empty"):
        open_dataset("manifest", path)


def test_whole_numbers_are_kept_and_texts_numbered_in_their_order(manifest):
    path = manifest(
        "train,0042,7,night,a.png", "train,7,0,day,b.png", "test,9,3,day,c.png", columns="split,identity,view,scene",
        modalities=["RGB"],
    )  # fmt: skip
    dataset = open_dataset("manifest", path)
    assert [(s.identity, s.camera, s.scene) for s in dataset.train] == [(42, 7, 1), (7, 0, 0)]
    assert dataset.num_cameras == 8


def test_without_cameras_none_are_known(manifest):
    lines = ["train,1,a.png", "train,2,b.png", "test,3,c.png", "test,3,d.png", "test,4,e.png"]
    path = manifest(*lines, columns="split,identity", modalities=["RGB"])
    dataset = open_dataset("manifest", path)
    assert dataset.num_cameras == 0
    assert [sample.name for sample in dataset.queries_without_match("none")] == ["e.png"]
    (problem,) = check_dataset("manifest", path)
    assert problem.message == "identity 4: 1 of 1 queries have no match in the gallery besides themselves"


def test_a_part_of_an_image_is_named_behind_its_path(tmp_path):
    both = Image.new("RGB", (16, 8), (255, 0, 0))
    both.paste((0, 0, 255), (8, 0, 16, 8))
    lines = ["split,identity,RGB,TI"]
    for number, split in enumerate(("train", "train", "test")):
        both.save(tmp_path / f"{number}.png")
        lines.append(f'{split},{number},"{number}.png#xywh=0,0,8,8","{number}.png#xywh=8,0,8,8"')
    (tmp_path / "list.csv").write_text("\n".join(lines))
    images = decode(open_dataset("manifest", tmp_path / "list.csv").train[0], (4, 4))
    assert images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]


WRONG = {
    "valid,1,1,a.png,b.png": "split must be one of train, query, gallery, test, got 'valid'",
    "train,,1,a.png,b.png": "identity is empty",
    "train,1,,a.png,b.png": "camera is empty; fill it in every line or leave the column out",
    "train,-1,1,a.png,b.png": "identity must not be negative, got -1; leave the line out where it is unknown",
    "train,1,1,a.png,": "TI is empty",
    "train,1,1,absent.png,b.png": "RGB names no file: 'absent.png'",
    "train,1,1,a.png": "4 cells, the names of the columns are 5",
    "train,1,1,rgb/train_ada.png,b.png": "RGB 'rgb/train_ada.png' stands in line 2 of train already",
    'train,1,1,a.png,"b.png': "not CSV (unexpected end of data); no line after it was read",
}


def test_every_wrong_line_is_listed_with_its_number(people, tmp_path):
    good = people.read_text().splitlines()
    people.write_text("\n".join([*good, "", *WRONG]))  # an empty line is none
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    problems = check_dataset("manifest", people)
    expected = [f"line {number}: {what}" for number, what in enumerate(WRONG.values(), start=len(good) + 2)]
    assert [problem.message for problem in problems] == expected
    assert {problem.path for problem in problems} == {people}


def test_unpaired_lines_are_left_out_on_request(people):
    people.write_text(people.read_text() + "train,eve,train,rgb/train_ada.png,\n")
    dataset = open_dataset("manifest", people, Options(unpaired="skip"))
    assert len(dataset.train) == 2
    (problem,) = check_dataset("manifest", people, options=Options(unpaired="skip"))
    assert (problem.severity, problem.message) == ("warning", "line 7: TI is empty")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("split;identity;RGB", "line 1: columns are separated by commas"),
        ("split,identity,RGB,RGB", "line 1: there are 2 columns 'RGB'"),
        ("split,identity,,RGB", "line 1: column 3 has no name"),
        ("set,RGB", "line 1: there is no column 'split'; there is no column 'identity' (columns: 'set', 'RGB')"),
        ("split,identity", "line 1: there is no column of paths, which every column but those is"),
        ("", "line 1: there are no names of columns"),
        ("split,identity," + 5000 * "a", "line 1: a column has a name of 5000 characters, more than 100"),
        (",".join(map(str, range(1200))), "line 1: 1200 columns, more than 1000"),
        ("split,identity,RGB", "no line for train and query and gallery of manifest"),
    ],
)
def test_a_file_without_its_columns_is_one_problem(header, message, tmp_path):
    path = tmp_path / "list.csv"
    path.write_text(header)
    assert check_dataset("manifest", path)[0].message.startswith(message)


def test_a_path_that_is_too_long_for_one_names_no_file(manifest):
    # manifests --seed 46 of the fuzzer
    path = manifest("train,1,0,a.png,a.png")
    path.write_text(path.read_text() + f"train,2,0,{9 * 'long'}.png,{5000 * 'a'}\n")
    messages = [problem.message for problem in check_dataset("manifest", path)]
    assert [message[:25] for message in messages[:2]] == ["line 3: RGB names no file", "line 3: TI names no file:"]
    assert max(map(len, messages)) < 300


def test_of_a_file_of_mistakes_the_first_thousand_are_listed(manifest, monkeypatch):
    # 10 MB of such lines took gigabytes
    path = manifest("test,1,0,a.png,a.png")
    path.write_text(path.read_text() + 1500 * "x\n" + 1500 * "x,1,0,a.png,a.png\n" + 1500 * "train,1,0,a.png,\n")
    problems = check_dataset("manifest", path, decode=False)
    said = [problem.message for problem in problems if not problem.message.startswith("line ")]
    assert said[:2] == ["2000 more lines are wrong", "500 more lines are wrong"]
    queries = path.with_name("queries.txt")
    queries.write_text(1500 * "x\n")
    problems = check_dataset("manifest", path, decode=False, options=Options(queries=str(queries)))
    assert [p.message for p in problems if p.path == queries and p.count > 1] == ["500 more lines are wrong"]


def test_a_directory_is_no_manifest(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_dataset("manifest", tmp_path)


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310"])
def test_a_known_layout_is_written_as_one_that_reads_the_same(name, write_dataset, tmp_path):
    known = open_dataset(name, write_dataset(name, tmp_path / name))
    lines = write_manifest(known, tmp_path / "list.csv")
    dataset = open_dataset("manifest", tmp_path / "list.csv")
    assert lines == (24 if name == "rgbnt201" else 36)  # whose test split is query and gallery
    for split in ("train", "query", "gallery"):
        of_layout, of_manifest = getattr(known, split), getattr(dataset, split)
        assert [(s.identity, s.camera, s.scene) for s in of_layout] == [
            (s.identity, s.camera, s.scene) for s in of_manifest
        ]
    assert torch.equal(decode(known.query[3], (8, 8)), decode(dataset.query[3], (8, 8)))


@pytest.fixture
def unsplit(tmp_path):
    lines = ["identity,camera,RGB"]
    lines += [
        f"p{identity},{camera},{identity}{camera}{n}.png" for identity in range(8) for camera in "ns" for n in "012"
    ]
    (tmp_path / "all.csv").write_text("\n".join(lines))
    return tmp_path / "all.csv"


def said(path, column="split"):
    return {row.cells["RGB"]: row.cells[column] for row in read_table(path).rows}


def test_splits_share_no_identity_between_training_and_test(unsplit, tmp_path):
    counts = split_manifest(unsplit, tmp_path / "split.csv", test=0.25, queries=1)
    assert counts == {"train": 36, "query": 4, "gallery": 8}
    rows = read_table(tmp_path / "split.csv").rows
    trained = {row.cells["identity"] for row in rows if row.cells["split"] == "train"}
    assert len(trained) == 6
    assert not trained & {row.cells["identity"] for row in rows if row.cells["split"] != "train"}
    queries = Counter((r.cells["identity"], r.cells["camera"]) for r in rows if r.cells["split"] == "query")
    assert set(queries.values()) == {1}


def test_splits_depend_on_the_seed_and_not_on_the_order_of_lines(unsplit, tmp_path):
    header, *lines = unsplit.read_text().splitlines()
    (tmp_path / "turned.csv").write_text("\n".join([header, *reversed(lines)]))
    results = []
    for number, (path, seed) in enumerate(((unsplit, 0), (tmp_path / "turned.csv", 0), (unsplit, 1))):
        split_manifest(path, tmp_path / f"{number}.csv", seed=seed)
        results.append(said(tmp_path / f"{number}.csv"))
    assert results[0] == results[1] != results[2]


def test_a_split_elsewhere_names_the_same_files(unsplit, tmp_path):
    (tmp_path / "below").mkdir()
    split_manifest(unsplit, tmp_path / "below" / "split.csv", queries=0)
    assert set(said(tmp_path / "below" / "split.csv")) == {f"../{name}" for name in said(unsplit, "identity")}


def test_a_stream_lies_in_no_directory_so_its_paths_are_absolute(unsplit, tmp_path, capfd):
    split_manifest(unsplit, Path("/dev/stdout"), queries=0)
    (tmp_path / "caught.csv").write_text(capfd.readouterr().out)
    assert set(said(tmp_path / "caught.csv")) == {str(tmp_path / name) for name in said(unsplit, "identity")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"test": 1.0}, "test must be a share between 0 and 1, got 1.0"),
        ({"queries": -1}, "queries must be at least 0, got -1"),
        (
            {"queries": 3},
            r"no line is left for the gallery \(.* than 3 of a camera\); queries 0 makes",
        ),
        ({"test": 0.9}, "at least 2 identities to train on and 1 to test with are needed, got 8"),
    ],
)
def test_impossible_splits_are_refused(arguments, message, unsplit, tmp_path):
    with pytest.raises(DataError, match=message):
        split_manifest(unsplit, tmp_path / "split.csv", **arguments)
    assert not (tmp_path / "split.csv").exists()


def test_parquet_holds_what_csv_holds(people, tmp_path):
    pytest.importorskip("pyarrow")
    table = read_table(people)
    write_table(tmp_path / "list.parquet", table.columns, [list(row.cells.values()) for row in table.rows])
    assert read_table(tmp_path / "list.parquet") == table
    assert open_dataset("manifest", tmp_path / "list.parquet").train == open_dataset("manifest", people).train


def test_parquet_of_what_is_not_utf8_is_refused(tmp_path):
    # manifests --seed 4 and 732 of the fuzzer
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(TableError, match=r"Parquet holds UTF-8 alone, which 'a\\udcff' is not; write CSV"):
        write_table(tmp_path / "list.parquet", ["a"], [["a\udcff"]])
    text = pyarrow.Array.from_buffers(
        pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\x01\0\0\0"), pyarrow.py_buffer(b"\xff")]
    )
    parquet.write_table(pyarrow.table({"a": text}), tmp_path / "list.parquet")
    with pytest.raises(TableError, match=r"not a Parquet file that can be read \('utf-8' codec"):
        read_table(tmp_path / "list.parquet")


@pytest.mark.parametrize(
    ("rows", "text", "message"),
    [(5_000_000, "a", "5000000 rows of 1 columns are more"), (5000, 200_000 * "a", "its texts are longer than those")],
    ids=["many rows", "long texts"],
)
def test_what_a_parquet_file_holds_very_often_does_not_fill_the_memory(rows, text, message, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int8)), [text])
    parquet.write_table(pyarrow.table({"a": column}), tmp_path / "list.parquet")
    assert (tmp_path / "list.parquet").stat().st_size < 1_000_000
    with pytest.raises(TableError, match=message):
        read_table(tmp_path / "list.parquet")


@pytest.mark.parametrize("enough", [False, True])
def test_a_table_that_there_is_no_memory_for_is_not_called_damaged(enough, tmp_path, monkeypatch):
    pyarrow = pytest.importorskip("pyarrow")

    def fail(*_):
        raise pyarrow.ArrowMemoryError("malloc of size 64 failed")

    def require(size):
        if not enough:
            raise MemoryError(size)

    write_table(tmp_path / "list.parquet", ["a"], [["1"]])
    monkeypatch.setattr("pyarrow.parquet.read_schema", fail)
    monkeypatch.setattr(tables, "require_memory", require)
    with pytest.raises(TableError if enough else MemoryError):
        read_table(tmp_path / "list.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(TableError, match="Parquet needs pyarrow: pip install"):
        write_table(tmp_path / "list.parquet", ["a"], [["1"]])


def test_the_model_takes_as_many_modalities_as_the_data():
    config = load_config("manifest", ["data.modalities=[RGB,TI]"])
    assert config.model.modalities == 2
    with pytest.raises(ConfigError, match=r"model.modalities must be 2 for data.modalities=\['RGB', 'TI'\], got 3"):
        load_config("manifest", ["data.modalities=[RGB,TI]", "model.modalities=3"])
    with pytest.raises(ConfigError, match=r"data.modalities must be different names, got \['TI', 'TI'\]"):
        load_config("manifest", ["data.modalities=[TI,TI]"])


def test_modules_that_relate_modalities_refuse_one(capsys):
    relating = ["selective_interaction", "global_alignment", "local_alignment"]
    with pytest.raises(ConfigError, match=f"modalities must be at least 2 for {', '.join(relating)}, got 1; set model"):
        load_config("manifest", ["data.modalities=[RGB]"])
    config = load_config("manifest", ["data.modalities=[RGB]", *(f"model.{name}=false" for name in relating)])
    assert config.model.modalities == 1


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["north", "gate=2", "north"], {0: "gate=2", 1: "north"}),
        (["7", "12", "007"], {7: "7", 12: "12"}),
        (["1700000001", "1700000000", "1700000001"], {0: "1700000000", 1: "1700000001"}),
        (["a\x1bb", "c", "c"], {0: "a\\x1bb", 1: "c"}),
    ],
)
def test_a_camera_is_called_what_the_column_says(manifest, texts, names):
    lines = [
        f"{split},{i},{text},{i}.png"
        for i, (split, text) in enumerate(zip(("train", "train", "test"), texts, strict=True))
    ]
    dataset = open_dataset("manifest", manifest(*lines, modalities=("RGB",)))
    assert dataset.camera_names == names
    assert dataset.cameras_in_words == f"2 cameras ({', '.join(names.values())})"


def test_of_many_cameras_a_line_names_the_first_ones_and_the_last():
    dataset = Dataset("manifest", Path("list.csv"), [], [], [], (), {i: f"at {i}" for i in range(100)})
    assert dataset.cameras_in_words == f"100 cameras ({', '.join(f'at {i}' for i in range(11))}, ..., at 99)"
    assert replace(dataset, camera_names={}).cameras_in_words == "no cameras"


@pytest.mark.parametrize(
    ("texts", "names"),
    [(("7", "8"), {}), (("007", "8"), {7: "007"}), (("ada", "b\x1b"), {0: "ada", 1: "b\\x1b"})],
)
def test_an_identity_has_a_name_where_its_number_does_not_say_it(manifest, texts, names):
    lines = [f"{split},{text},0,{split}{i}.png" for i, text in enumerate(texts) for split in ("train", "test")]
    assert open_dataset("manifest", manifest(*lines, modalities=("RGB",))).identity_names == names
