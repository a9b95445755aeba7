"""From images to an answer, in Python and as a program; see `test_index.py` for the search itself."""

import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import signal_reid
from signal_reid import checkpoints
from signal_reid.cli import main
from signal_reid.config import dump_config
from signal_reid.data import Augmentation, DataError, decode, open_dataset
from signal_reid.data.decoding import EVALUATION
from signal_reid.data.layouts import ImageSource
from signal_reid.data.tables import write_table
from signal_reid.evaluation import load_features
from signal_reid.evaluation.missing import SubsetFeatures
from signal_reid.evaluation.trained import load_model
from signal_reid.methods.registry import build_model
from signal_reid.runtime.errors import InputError
from signal_reid.search import Description, Entry, Index, entries_of, find_entries, sources

MODALITIES = ("RGB", "NI", "TI")


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the program; returns exit code, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["signal-reid", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def retriever(weights):
    return signal_reid.Retriever(weights)


def test_the_example_of_the_docstring_runs(weights, photos, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copy(weights, "best.safetensors")
    photos.rename("gallery")
    first = min((tmp_path / "gallery" / "TI").iterdir()).name
    shutil.copy(f"gallery/rgb/{first}", "a.jpg")
    Image.open(f"gallery/TI/{first}").save("a_thermal.png")
    example = re.search(r"\n((?:        \S.*\n|            \S.*\n)+)", signal_reid.Retriever.__doc__)[1]
    example = "\n".join(line[8:] for line in example.splitlines())
    assert len(re.findall(r"^\S", example, re.MULTILINE)) <= 5
    calibration = next(line for line in example.splitlines() if "calibrate" in line)
    exec(example.replace(calibration, ""), {"signal_reid": signal_reid})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith(f"1 {first.removesuffix('.jpg')} ")
    with pytest.raises(InputError, match="a threshold needs items of two identities"):
        exec(calibration, {"retriever": signal_reid.Retriever("best.safetensors", "gallery.index")})


def test_features_of_whole_samples_are_the_models_without_cameras(retriever, weights, synthetic):
    samples = open_dataset("rgbnt201", synthetic()).gallery[:3]
    config, model, _ = load_model(weights)
    images = torch.stack([decode(sample, config.data.image_size, EVALUATION) for sample in samples])
    prepared = Augmentation(config.data).normalize(images)
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(model.eval()(prepared, None), dim=1)
        prepared[:, 1] = 0
        without_near_infrared = torch.nn.functional.normalize(model(prepared, None), dim=1)
    entries = entries_of(samples)
    assert torch.allclose(retriever.features_of(entries), expected, atol=1e-6)
    items = [{"RGB": s.sources[0].path, "TI": s.sources[2].path} for s in samples]
    assert torch.allclose(retriever.features(items), without_near_infrared, atol=1e-6)


def test_images_in_memory_are_images_in_files(retriever, synthetic):
    sample = open_dataset("rgbnt201", synthetic()).gallery[0]
    paths = dict(zip(MODALITIES, (source.path for source in sample.sources), strict=True))
    arrays = {name: np.asarray(Image.open(path).convert("RGB")) for name, path in paths.items()}
    pictures = {name: Image.open(path) for name, path in paths.items()}
    one, two, three = retriever.features([paths, arrays, pictures])
    assert torch.allclose(one, two, atol=1e-6)
    assert torch.equal(two, three)
    with pytest.raises(InputError, match=r"RGB must be a Pillow image, uint8 of shape .*, got float64 of shape \(4,\)"):
        retriever.features([{"RGB": np.zeros(4)}])
    with pytest.raises(InputError, match="images must be of the modalities RGB, NI, TI, got 'depth'"):
        retriever.features([{"depth": paths["RGB"]}])


def test_weights_are_known_by_what_decides_a_feature(tiny_config, weights, tmp_path):
    retriever = signal_reid.Retriever(weights)
    mark = retriever.maker.fingerprint
    config, model, _ = load_model(weights)
    authors = tmp_path / "authors.pth"
    checkpoints.export(model, authors, "authors", config)
    bare = ["model.global_alignment=false", "model.local_alignment=false", "evaluation.precision=bf16"]
    assert signal_reid.Retriever(weights, overrides=bare).maker.fingerprint == mark
    (tmp_path / "config.yml").write_text(dump_config(config))
    assert signal_reid.Retriever(authors, config=tmp_path / "config.yml").maker.fingerprint == mark
    assert signal_reid.Retriever(weights, overrides=["model.k_intra=19"]).maker.fingerprint != mark
    torch.manual_seed(5)
    other = tmp_path / "other.safetensors"
    checkpoints.export(build_model(config, 5, 2), other, "ours", config)
    retriever.build(tmp_path / "index", entries_of(open_dataset("rgbnt201", config.data.root).gallery[:4]))
    with pytest.raises(InputError, match="was made by other weights or settings than"):
        signal_reid.Retriever(other, tmp_path / "index")


def test_a_directory_names_its_items_and_lacks_what_it_lacks(photos):
    (photos / "TI" / "alone.JPG").write_bytes(min((photos / "TI").iterdir()).read_bytes())
    (photos / "rgb" / ".hidden.jpg").write_bytes(b"")
    entries = find_entries(photos, MODALITIES)
    names = [entry.name for entry in entries]
    assert names == sorted(names)
    assert len(names) == 1 + len(list((photos / "rgb").glob("[!.]*")))
    alone = next(entry for entry in entries if entry.name == "alone")
    assert [source is not None for source in alone.sources] == [False, False, True]
    assert entries[0].sources[0].path.parent.name == "rgb"
    shutil.copy(photos / "TI" / "alone.JPG", photos / "TI" / "alone.png")
    with pytest.raises(DataError, match=r"alone\.JPG and .*alone\.png are both TI of 'alone'; remove one"):
        find_entries(photos, MODALITIES)


def test_patterns_say_which_image_is_of_which_modality(tmp_path):
    for name in ("a_vis.jpg", "b_vis.jpg", "sub/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    entries = find_entries(tmp_path, MODALITIES, {"RGB": "*_vis.jpg", "TI": "sub/*"})
    assert [(e.name, [s and s.path.relative_to(tmp_path).as_posix() for s in e.sources]) for e in entries] == [
        ("a", ["a_vis.jpg", None, "sub/a.png"]),
        ("b", ["b_vis.jpg", None, None]),
    ]
    for patterns, message in (
        ({"RGB": "a.jpg"}, r"the pattern of RGB must have one \*, got 'a.jpg'"),
        ({"depth": "*"}, "images must be of the modalities RGB, NI, TI, got 'depth'"),
        ({"RGB": "*_none.jpg"}, "no images"),
        (None, "which image is of which modality"),
    ):
        with pytest.raises(InputError, match=message):
            find_entries(tmp_path, MODALITIES, patterns)
    assert len(find_entries(tmp_path, ["RGB"])) == 3


def test_a_list_has_a_line_for_each_item(tmp_path, monkeypatch):
    for name in ("a.jpg", "a.png", "b.png"):
        (tmp_path / name).touch()
    path = tmp_path / "list.txt"
    path.write_text("a.jpg\t\ta.png\n\n\t\tb.png\n")
    entries = find_entries(path, MODALITIES)
    assert [(e.name, [s and s.path.name for s in e.sources]) for e in entries] == [
        ("a.jpg", ["a.jpg", None, "a.png"]),
        ("b.png", [None, None, "b.png"]),
    ]
    path.write_text("a.jpg\nnone.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt: line 2: no file .*none\.jpg"):
        find_entries(path, MODALITIES)
    path.write_text("a.jpg\ta.jpg\ta.jpg\ta.jpg\n")
    with pytest.raises(DataError, match="line 1: 4 paths, more than the modalities RGB, NI, TI"):
        find_entries(path, MODALITIES)
    monkeypatch.setattr(sources, "MOST_ITEMS", 2)
    path.write_text("a.jpg\nb.png\na.jpg\n")
    with pytest.raises(DataError, match=r"list\.txt: more than 2 lines, of fewer than 20 characters each"):
        find_entries(path, MODALITIES)


def test_a_manifest_has_a_column_for_each_modality_and_labels_where_they_are_known(tmp_path):
    for name in ("a.jpg", "a.png", "b.png"):
        (tmp_path / name).touch()
    path = tmp_path / "manifest.csv"
    path.write_text('split,TI,identity,RGB\ntest,a.png,7,a.jpg\ntest,"b.png#xywh=1,2,3,4",,\n')
    first, second = find_entries(path, MODALITIES)
    assert [source and source.path.name for source in first.sources] == ["a.jpg", None, "a.png"]
    assert (first.name, first.identity, first.camera) == ("a.jpg", 7, -1)
    assert (second.sources[:2], second.sources[2].box, second.identity) == ((None, None), (1, 2, 4, 6), -1)
    path.write_text("TI,identity,camera\na.png,ada,01\na.png,bob,north\nb.png,ada,1\n")
    entries = find_entries(path, MODALITIES)
    ada, bob, again = (entry.identity for entry in entries)
    assert ada == again != bob
    assert min(ada, bob) >= 2**52
    assert [entry.identity_shown for entry in entries] == ["ada", "bob", "ada"]
    assert [entry.camera_shown for entry in entries] == ["01", "north", "1"]
    for text, message in (
        (f"TI,{200_000 * 'x'}\na.png,x\n", "line 1: "),
        ("TI,identity\na.png,-1\n", "line 2: identity must not be negative or beyond 18 digits, got '-1'"),
        ("TI\nnone.png\n", "line 2: no file .*none.png"),
        ("TI,RGB,identity\n,,7\n", "line 2: there is no image"),
        ("depth\na.png\n", r"line 1: no column is one of RGB, NI, TI, got \['depth'\]"),
        ("TI\n\0\n", "line 2: "),
        ("", "line 1: there are no names of columns"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=message):
            find_entries(path, MODALITIES)


def test_samples_are_called_as_their_data_set_calls_them(synthetic, tmp_path):
    dataset = open_dataset("rgbnt201", synthetic())
    sample = dataset.gallery[0]
    named = replace(dataset, identity_names={sample.identity: "ada"})
    (unnamed,), (entry,) = entries_of([sample]), entries_of([sample], named)
    assert (unnamed.identity_shown, unnamed.camera_shown) == (str(sample.identity), str(sample.camera))
    assert (entry.identity_shown, entry.camera_shown) == ("ada", f"cam{sample.camera + 1}")
    (tmp_path / "a.png").touch()
    (tmp_path / "list.csv").write_text("TI,identity\na.png,ada\n")
    assert entry.identity == find_entries(tmp_path / "list.csv", MODALITIES)[0].identity


def test_a_manifest_may_be_parquet_and_its_broken_lines_are_named(tmp_path):
    (tmp_path / "a.jpg").touch()
    (tmp_path / "manifest.csv").write_text("RGB,identity\na.jpg\n")
    with pytest.raises(DataError, match=r"manifest\.csv: line 2: 1 cells, the names of the columns are 2"):
        find_entries(tmp_path / "manifest.csv", MODALITIES)
    pytest.importorskip("pyarrow")
    write_table(tmp_path / "manifest.parquet", ("RGB", "identity"), [("a.jpg", "7")])
    (entry,) = find_entries(tmp_path / "manifest.parquet", MODALITIES)
    assert (entry.sources[0].path, entry.identity) == (tmp_path / "a.jpg", 7)


def test_images_are_read_as_the_training_read_them(retriever, weights, tmp_path):
    values = np.random.default_rng(0).integers(7000, 9000, (64, 64), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    eight = np.rint(np.clip((values.astype(np.float64) - 7000) * (255 / 2000), 0, 255)).astype(np.uint8)
    Image.fromarray(eight).save(tmp_path / "eight.png")
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    settings = ["data.images.ranges={TI: [7000, 9000]}", "data.images.background=[255, 0, 0]"]
    with_range = signal_reid.Retriever(weights, overrides=settings)
    one, two, three, four, five = with_range.features(
        [
            {"TI": tmp_path / "deep.png"},
            {"TI": values},
            {"TI": tmp_path / "eight.png"},
            {"TI": clear},
            {"TI": Image.new("RGB", (64, 64), (255, 0, 0))},
        ]
    )
    assert torch.equal(one, two)
    assert torch.equal(one, three)
    assert torch.equal(four, five)
    assert with_range.maker.fingerprint != retriever.maker.fingerprint
    for image in (tmp_path / "deep.png", values):
        with pytest.raises(DataError, match="is deeper than 8 bits"):
            retriever.features([{"TI": image}])


def test_a_split_is_opened_as_it_is_configured(run, weights, synthetic, tmp_path):
    names = [sample.name for sample in open_dataset("rgbnt201", synthetic()).query[:2]]
    (tmp_path / "queries.txt").write_text("\n".join(names))
    asked = ("--split", "query", f"data.queries={tmp_path / 'queries.txt'}")
    code, _, told = run("index", "build", tmp_path / "index", "-w", weights, *asked)
    assert code == 0
    assert told.startswith("2 items of ")


def test_scores_of_present_parts_are_those_of_the_evaluation(retriever, weights, synthetic):
    samples = open_dataset("rgbnt201", synthetic()).gallery[:5]
    entries = [Entry(s.name, (s.sources[0], None, s.sources[2])) for s in samples]
    present = signal_reid.Retriever(weights, overrides=["evaluation.absent=present"])
    features = present.features_of(entries)
    config, model, _ = load_model(weights)
    images = torch.stack([decode(sample, config.data.image_size, EVALUATION) for sample in samples])
    with torch.inference_mode():
        parts = SubsetFeatures(model.eval(), [(0, 2)], "present", [0])
        whole = parts(Augmentation(config.data).normalize(images))[:, model.feature_columns()[[0, 2]].flatten()]
    expected = torch.nn.functional.cosine_similarity(whole[:, None], whole[None], dim=2)
    assert torch.allclose(features @ features.T, expected, atol=1e-6)
    assert present.maker.fingerprint != retriever.maker.fingerprint


def test_the_program_builds_adds_calibrates_and_answers(run, weights, photos, tmp_path):
    index, page, answer = tmp_path / "index", tmp_path / "page.html", tmp_path / "answer.json"
    assert run("index", "build", index, "-w", weights, "--images", photos)[0] == 0
    assert run("index", "add", index, "-w", weights, "--split", "gallery")[0] == 0
    code, _, told = run("index", "calibrate", index, "-w", weights, "--false-accept-rate", "0.1")
    assert (code, told[:9]) == (0, "threshold")
    code, told, _ = run("index", "info", index)
    assert code == 0
    for fact in ("RGB 24, NI 12, TI 24", "24", "as they were written"):
        assert fact in told
    first = min((photos / "TI").iterdir()).name
    query = ["-i", f"RGB={photos / 'rgb' / first}", "-i", f"TI={photos / 'TI' / first}"]
    code, told, _ = run("index", "search", index, "-w", weights, *query, "--top", 3)
    assert code == 0
    assert first.removesuffix(".jpg") in told
    assert run("index", "search", index, "-w", weights, *query, "--top", 3, "--output", answer)[0] == 0
    (one,) = json.loads(answer.read_text())["queries"]
    assert [hit["rank"] for hit in one["results"]] == [1, 2, 3]
    assert one["results"][0]["name"] == first.removesuffix(".jpg")
    assert one["results"][0]["score"] > 0.9999
    assert one["results"][0]["accepted"]
    labelled = [hit for hit in one["results"] if "camera" in hit]
    assert labelled
    for hit in labelled:
        assert (hit["camera_name"], hit["identity_name"]) == (f"cam{hit['camera'] + 1}", str(hit["identity"]))
    code, told, _ = run("index", "search", index, "-w", weights, *query, "--top", 3)
    assert f"cam{labelled[0]['camera'] + 1}" in told
    (photos / "rgb" / first).unlink()
    assert run("index", "search", index, "-w", weights, "--split", "query", "--output", page)[0] == 0
    text = page.read_text()
    assert text.count('aria-label="Query ') == 12
    assert "RGB cannot be read" in text
    assert "accepted" in text
    assert "<bdi>cam1</bdi>" in text


def test_an_index_that_cannot_be_made_is_not_there(run, weights, retriever, photos, tmp_path, monkeypatch):
    path = tmp_path / "index"
    (photos / "rgb" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="broken"):
        retriever.build(path, photos)
    assert not path.exists()
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match="FAISS is not installed"):
        retriever.build(path, photos, kind="flat")
    assert not path.exists()
    (photos / "rgb" / "broken.jpg").unlink()
    description = Description(retriever.maker.fingerprint, MODALITIES, retriever.maker.dimension)
    Index.create(path, description)  # as a process that was killed leaves it
    code, _, told = run("index", "search", path, "-w", weights, "--images", photos)
    assert (code, told.count("\n")) == (2, 1)
    assert "has no items to find" in told
    one = [Entry("one", (ImageSource(min((photos / "TI").iterdir())), None, None))]
    assert len(retriever.build(path, one)) == 1
    with pytest.raises(InputError, match="holds an index already"):
        Index.create(path, description)
    (path / "index.json").write_text("{")
    with pytest.raises(InputError, match="holds an index already"):
        retriever.build(path, one)


def test_extract_takes_images_without_labels(run, weights, photos, tmp_path, retriever):
    output = tmp_path / "features.safetensors"
    assert run("extract", "-w", weights, "--images", photos, "--output", output)[0] == 0
    features, names = load_features(output)
    entries = find_entries(photos, MODALITIES)
    assert names == [entry.name for entry in entries]
    assert torch.allclose(features.features, retriever.features_of(entries), atol=1e-6)
    assert (features.identities == -1).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["search", "INDEX", "-w", "W"], "give one of --images and --split, or for a search --image"),
        (["search", "INDEX", "-w", "W", "-i", "RGB"], "--image must be MODALITY=VALUE"),
        (["search", "INDEX", "-w", "W", "-i", "RGB=none.jpg"], "none.jpg: no such image"),
        (["search", "INDEX", "-w", "W", "--split", "query", "--output", "a.csv"], "answers are written to"),
        (["build", "INDEX", "-w", "W", "--split", "query"], "holds an index already"),
        (["build", "new", "-w", "W", "--images", "nowhere"], "nowhere: no such file or directory"),
    ],
)
def test_mistakes_are_one_line(run, weights, retriever, synthetic, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    retriever.build("index", entries_of(open_dataset("rgbnt201", synthetic()).gallery[:2]))
    named = {"INDEX": "index", "W": weights}
    code, _, told = run("index", *(named.get(argument, argument) for argument in arguments))
    assert code == 2
    assert told.count("\n") == 1
    assert message in told
