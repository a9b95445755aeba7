import hashlib
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from signal_reid.data import open_dataset
from signal_reid.data.synthetic import scenes, synthesize
from signal_reid.data.synthetic.drawing import Part
from signal_reid.data.synthetic.identities import AttributeDraw, generator
from signal_reid.data.synthetic.scenes import SHIFT, Camera, Framing, photograph

LAYOUTS = ("rgbnt201", "rgbnt100", "msvr310")
FOLDERS = {
    "rgbnt201": ("train_171", "test", "test"),
    "rgbnt100": ("bounding_box_train", "query", "bounding_box_test"),
    "msvr310": ("bounding_box_train", "query3", "bounding_box_test"),
}
SMALL = {"train_identities": 2, "test_identities": 2, "images_per_identity": 4, "cameras": 2}


@pytest.fixture(scope="module")
def generated(tmp_path_factory):
    """Roots of sets with 12 test identities, and 24 to train on for persons, made on first use."""
    made = {}

    def root(name):
        if name not in made:
            size = {"rgbnt201": (96, 48), "rgbnt100": None, "msvr310": (48, 96)}[name]
            train = 24 if name == "rgbnt201" else 1
            output = tmp_path_factory.mktemp("generated") / name
            made[name] = synthesize(name, output, train_identities=train, test_identities=12, image_size=size)
        return made[name]

    return root


def read(root, name, folder, size):
    """Triplets (n, 3, H, W, 3) resized to `size` (H, W), identities, and cameras or scenes, by the published names."""
    triplets, identities, cameras = [], [], []
    for files, identity, camera in list_triplets(root, name, folder):
        if name == "rgbnt100":
            composite = Image.open(files[0])
            images = [composite.crop((256 * column, 0, 256 * column + 256, 128)) for column in range(3)]
        else:
            images = [Image.open(file) for file in files]
        triplets.append([np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR)) for image in images])
        identities.append(identity)
        cameras.append(camera)
    return np.array(triplets, np.float32), np.array(identities), np.array(cameras)


def list_triplets(root, name, folder):
    if name == "rgbnt201":
        for file in sorted((root / folder / "RGB").glob("*.jpg")):
            identity, camera = re.fullmatch(r"(\d{6})_cam(\d)_\d+\.jpg", file.name).groups()
            yield [root / folder / modality / file.name for modality in ("RGB", "NI", "TI")], int(identity), int(camera)
    elif name == "rgbnt100":
        for file in sorted((root / "rgbir" / folder).glob("*.jpg")):
            identity, camera = re.match(r"(\d+)_c(\d+)", file.name).groups()
            yield [file], int(identity), int(camera)
    else:
        for file in sorted((root / folder).glob("*/vis/*.jpg")):
            files = [file.parents[1] / modality / file.name for modality in ("vis", "ni", "th")]
            yield files, int(file.name[0:4]), int(file.name[6:9])


def mean_average_precision(query, gallery):
    """mAP of features, identities and cameras, the query's identity in its own camera dropped."""
    precisions = []
    for feature, identity, camera in zip(*query, strict=True):
        features, identities, cameras = gallery
        kept = (identities != identity) | (cameras != camera)
        order = np.argsort(((features[kept] - feature) ** 2).sum(1), kind="stable")
        match = (identities[kept] == identity)[order]
        precisions.append((match.cumsum() / np.arange(1, len(match) + 1))[match].mean())
    return np.mean(precisions)


def digest(root):
    files = sorted(file for file in root.rglob("*") if file.is_file())
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("name", LAYOUTS)
def test_raw_pixel_distance_ranks_badly(generated, name):
    size = (64, 32) if name == "rgbnt201" else (32, 64)
    _, query, gallery = (read(generated(name), name, folder, size) for folder in FOLDERS[name])
    flat = [(images.reshape(len(images), -1), *labels) for images, *labels in (query, gallery)]
    assert mean_average_precision(*flat) < 0.4


def test_what_pixels_hide_a_linear_discriminant_of_other_identities_finds(generated):
    root = generated("rgbnt201")
    train, test = (read(root, "rgbnt201", folder, (8, 4)) for folder in ("train_171", "test"))
    project = fit_discriminant(train[0], train[1])
    features = (project(test[0]), *test[1:])
    assert mean_average_precision(features, features) > 0.7


def fit_discriminant(images, identities):
    """Whiten by the scatter within identities; both mirrorings of every image are seen."""

    def features(x):
        return np.log(x + 8).reshape(len(x), -1)

    both = features(np.concatenate([images, images[:, :, :, ::-1]]))
    twice = np.concatenate([identities, identities])
    within = np.concatenate([both[twice == i] - both[twice == i].mean(0) for i in np.unique(identities)])
    scatter = within.T @ within / len(within)
    scatter += 0.1 * np.trace(scatter) / len(scatter) * np.eye(len(scatter))
    whiten = np.linalg.inv(np.linalg.cholesky(scatter)).T

    def project(x):
        projected = (features(x) + features(x[:, :, :, ::-1]) - 2 * both.mean(0)) @ whiten
        return projected / np.linalg.norm(projected, axis=1, keepdims=True)

    return project


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_query_has_a_match_under_its_protocol(generated, name):
    query, gallery = (list(list_triplets(generated(name), name, folder)) for folder in FOLDERS[name][1:])
    assert len({identity for _, identity, _ in query}) == 12
    for _, identity, camera in query:
        assert any(other == identity and place != camera for _, other, place in gallery)


@pytest.mark.parametrize("images", [2, 3, 4])
def test_every_query_has_a_match_where_queries_are_not_in_the_gallery(tmp_path, images):
    counts = {"train_identities": 2, "test_identities": 2, "images_per_identity": images, "cameras": 4}
    dataset = open_dataset("market1501mm", synthesize("market1501mm", tmp_path / "x", image_size=(32, 32), **counts))
    assert len(dataset.query) == 2 * (images // 2)
    assert dataset.queries_without_match("camera") == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_training_and_test_identities_are_disjoint(generated, name):
    train, query, gallery = ({i for _, i, _ in list_triplets(generated(name), name, f)} for f in FOLDERS[name])
    assert not train & gallery
    assert query <= gallery


def test_persons_have_the_same_file_names_in_each_modality(generated):
    for folder in ("train_171", "test"):
        names = [sorted(p.name for p in (generated("rgbnt201") / folder / m).iterdir()) for m in ("RGB", "NI", "TI")]
        assert names[0] == names[1] == names[2] != []


def test_rgbnt100_composites_are_768_by_128(generated):
    sizes = {Image.open(file).size for file in (generated("rgbnt100") / "rgbir").rglob("*.jpg")}
    assert sizes == {(768, 128)}


def test_msvr310_names_carry_identity_scene_and_view_at_the_published_places(generated):
    for file in generated("msvr310").rglob("*.jpg"):
        assert file.name[0:4] == file.parents[1].name
        assert file.name[4:6] == "_s"
        assert 1 <= int(file.name[6:9]) <= 4
        assert file.name[9:11] == "_v"
        assert 0 <= int(file.name[11]) <= 7


def test_some_rgb_pictures_are_dark_where_near_infrared_is_not(generated):
    images, _, _ = read(generated("rgbnt201"), "rgbnt201", "train_171", (16, 8))
    brightness = images.mean((2, 3, 4))  # (n, 3)
    dark = brightness[:, 0] < 45
    assert 0.15 < dark.mean() < 0.6
    assert (brightness[dark, 1] > 60).mean() > 0.9


@pytest.mark.parametrize("name", LAYOUTS)
def test_equal_arguments_give_equal_bytes(name, tmp_path):
    size = None if name == "rgbnt100" else (64, 64)
    first, second, other = (
        synthesize(name, tmp_path / place, **SMALL, image_size=size, seed=seed)
        for place, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    assert digest(first) == digest(second)
    assert digest(first) != digest(other)


def test_a_picture_does_not_depend_on_how_many_others_there_are(tmp_path):
    few = synthesize("rgbnt201", tmp_path / "few", **SMALL, image_size=(64, 32))
    many = synthesize("rgbnt201", tmp_path / "many", **{**SMALL, "test_identities": 4}, image_size=(64, 32))
    assert digest(few).items() < digest(many).items()


def test_an_occupied_output_is_refused_and_left_alone(tmp_path):
    (tmp_path / "precious").write_text("data")
    with pytest.raises(FileExistsError, match=re.escape(str(tmp_path))):
        synthesize("msvr310", tmp_path, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_an_empty_output_is_filled(tmp_path):
    (tmp_path / "empty").mkdir()
    synthesize("msvr310", tmp_path / "empty", **SMALL, image_size=(32, 64))
    assert {path.name for path in (tmp_path / "empty").iterdir()} == set(FOLDERS["msvr310"])


def test_an_interruption_leaves_nothing(tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthesize("rgbnt201", tmp_path / "set", **SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_triplets(tmp_path):
    seen = []
    synthesize("rgbnt201", tmp_path / "set", **SMALL, image_size=(32, 32), progress=lambda *count: seen.append(count))
    assert seen == [(done, 16) for done in range(1, 17)]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("market1501", {}, "dataset must be one of .*rgbnt201.*, got 'market1501'"),
        ("rgbnt100", {"image_size": (64, 128)}, r"image_size must be \(128, 256\)"),
        ("rgbnt201", {"image_size": (8, 8)}, "image_size must be in 32..1024"),
        ("rgbnt100", {"train_identities": 599, "test_identities": 2}, "test_identities must be in 1..1 .*got 2"),
        ("rgbnt201", {"cameras": 1}, "cameras must be in 2..9 .*got 1"),
        ("rgbnt201", {"images_per_identity": 1}, "images_per_identity must be in 2.."),
        ("msvr310", {"seed": -1}, "seed must be in 0.."),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(tmp_path, name, arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        synthesize(name, tmp_path / "set", **arguments)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "set").exists()


def test_each_level_of_an_attribute_is_taken_once_in_every_run_of_identities():
    levels = [AttributeDraw(seed=0, identity=identity).pick("abcd") for identity in range(8, 12)]
    assert sorted(levels) == list("abcd")


class Block:
    """A subject that is one bright square in every modality."""

    surfaces = {Part.PANEL: (255.0, 255.0, 255.0, 1.0, 1.0)}  # noqa: RUF012
    patterns = ("plain", "plain", "plain")

    def draw(self, pencil, rng, view):
        box = (-0.2, -0.6, 0.2, -0.2)
        pencil.box(box, Part.PANEL)
        return pencil.box_to_canvas(box)


def test_near_infrared_and_thermal_are_shifted_against_each_other_by_some_pixels(monkeypatch):
    monkeypatch.setattr(scenes, "_draw_occluder", lambda *_: None)
    framing = Framing((100, 100), unit=(1, 1), length=(0.9, 0.9), ground=(0.95, 0.95), sideways=0.0)
    installed = Camera.install(0, 1, framing)
    camera = replace(installed, surfaces=np.zeros_like(installed.surfaces), noise=0.0)
    shifts = []
    for seed in range(12):
        pictures = photograph(Block(), camera, framing, generator(seed, "picture"))
        near_infrared, thermal = (np.flatnonzero(np.asarray(picture)[:, 50, 0] > 100)[0] for picture in pictures[1:])
        shifts.append(abs(near_infrared - thermal))
    assert np.mean(shifts) >= 1
    assert max(shifts) <= 2 * SHIFT * 100 + 2
