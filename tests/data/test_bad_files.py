"""What data check says of each kind of bad file in each layout: a row for each, planted in one data set per layout.

Every layout gets all kinds at once, each on images of its own, so that no kind hides another and the table stays cheap.
"""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from signal_reid.data.checking import check_dataset
from signal_reid.data.layouts import open_dataset
from signal_reid.data.manifests import write_manifest

LAYOUTS = ("rgbnt201", "rgbnt100", "msvr310", "rgbn300", "wmveid863", "market1501mm", "manifest")
COMPOSITES = ("rgbnt100", "rgbn300")


def corrupt(path):
    path.write_bytes(path.read_bytes()[:-40])


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("no image")


def postscript(path):
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")


def oversized(path):
    Image.new("1", (8192, 8192)).save(path, "PNG", compress_level=1)


def rotated(path):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.open(path)
    image.save(path, exif=exif)


def transparent(path):
    image = Image.open(path).convert("RGBA")
    image.putpixel((0, 0), (255, 255, 255, 0))
    image.save(path, "PNG")


def cmyk(path):
    Image.open(path).convert("CMYK").save(path, "JPEG")


def deep(path):
    width, height = Image.open(path).size
    Image.fromarray(np.full((height, width), 3000, np.uint16)).save(path, "PNG")


def deep_colour(path):
    """A PNG of 16 bits in each of three channels, which Pillow does not write."""
    width, height = Image.open(path).size
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(6 * width)) * height)
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def dangling(path):
    path.unlink()
    path.symlink_to("nowhere.jpg")


def beside(path):
    Image.open(path).save(path.with_suffix(".png"))


def other_suffix(path):
    path.rename(path.with_suffix(".gif"))


def misnamed(path):
    path.rename(path.with_name(f"odd{path.name[-6:]}"))


FILES = {
    corrupt: ("error", "unreadable image"),
    empty: ("error", "not an image"),
    text: ("error", "not an image"),
    postscript: ("error", "not an image"),
    oversized: ("error", "an image of 8192x8192 pixels"),
    rotated: ("warning", "rotated or mirrored by EXIF"),
    transparent: ("warning", "transparent in places"),
    cmyk: ("warning", "CMYK"),
    deep: ("error", "deeper than 8 bits; data.images.ranges"),
    deep_colour: ("error", "16 bits for each of several channels"),
}
"""Kinds that concern what a file holds: planted in the first modality of a sample."""

NAMES = {
    dangling: ("warning", "linked to what is not there"),
    other_suffix: ("warning", "no images by their suffix"),
    beside: ("error", "which of them is meant?"),
    misnamed: ("error", "name does not parse"),
}
"""Kinds that concern where a file is: planted in all modalities of a sample, but for `beside`."""

OF_MANIFEST = {
    dangling: ("error", "names no file"),
    other_suffix: ("error", "names no file"),
    misnamed: ("error", "names no file"),
}
"""What they are where a file names its images. A second file beside is no matter there."""

JUNK = ("._a.jpg", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/a.jpg")


@pytest.fixture(scope="module")
def problems(write_dataset, tmp_path_factory):
    """What is said of each layout's data set with all kinds planted, and where each was."""
    made = {}

    def planted(name):
        if name not in made:
            directory = tmp_path_factory.mktemp(name)
            known = "rgbnt201" if name == "manifest" else name
            root = write_dataset(known, directory / "data")
            dataset = open_dataset(known, root)
            samples, places = iter([*dataset.train, *dataset.query]), {}
            if name == "manifest":
                write_manifest(dataset, root / "list.csv")
                root = root / "list.csv"
            for kind in FILES:
                places[kind] = next(samples).sources[0].path
                kind(places[kind])
            for kind in NAMES:
                sources = next(samples).sources
                places[kind] = sources[0].path
                for path in {source.path for source in sources[: 1 if kind is beside else None]}:
                    kind(path)
            missing = next(samples).sources[-1].path
            missing.unlink()
            places["unpaired"] = missing
            for junk in JUNK:
                path = places[corrupt].parent / junk
                path.parent.mkdir(exist_ok=True)
                shutil.copy(places[rotated], path)
            made[name] = check_dataset(name, root), places
        return made[name]

    return planted


def says(problem, path, severity, words):
    """Whether a problem is of this severity, in these words, of this file."""
    named = (
        problem.path.stem == path.stem
        or path.stem in problem.message
        or "odd" in f"{problem.path.name}{problem.message}"
    )
    return (problem.severity, words in problem.message, named) == (severity, True, True)


@pytest.mark.parametrize("kind", FILES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_file_holds_is_named(name, kind, problems):
    found, places = problems(name)
    assert any(says(problem, places[kind], *FILES[kind]) for problem in found), found


@pytest.mark.parametrize("kind", NAMES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("name", LAYOUTS)
def test_where_a_file_is_is_named(name, kind, problems):
    found, places = problems(name)
    if name == "manifest" and kind is beside:
        assert not any(NAMES[beside][1] in problem.message for problem in found)
        return
    severity, words = OF_MANIFEST[kind] if name == "manifest" else NAMES[kind]
    if name == "wmveid863" and kind is beside:
        severity = "warning"  # as unpaired files are there
    assert any(says(problem, places[kind], severity, words) for problem in found), found


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name not in COMPOSITES])
def test_an_unpaired_file_is_named(name, problems):
    found, places = problems(name)
    severity = "warning" if name == "wmveid863" else "error"
    words = "names no file" if name == "manifest" else "missing modality"
    assert any(says(problem, places["unpaired"], severity, words) for problem in found), found


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_desktops_and_archivers_leave_is_ignored(name, problems):
    found, _ = problems(name)
    assert not [problem for problem in found for junk in JUNK if os.path.basename(junk) in str(problem)]
    assert not [problem for problem in found if "MACOSX" in str(problem)]


def test_files_of_one_kind_are_one_warning_with_the_first_three_names(rgbnt201):
    folders = [rgbnt201 / "train_171" / modality for modality in ("RGB", "NI", "TI")]
    for folder in folders:
        for number in range(2):
            (folder / f"00000{number + 1}_cam1_0_00.jpg").rename(folder / f"00000{number + 1}_cam1_0_00.jxl")
    (problem,) = check_dataset("rgbnt201", rgbnt201)
    names = "train_171/NI/000001_cam1_0_00.jxl, train_171/NI/000002_cam1_0_00.jxl, train_171/RGB/000001_cam1_0_00.jxl"
    assert problem.message.startswith("6 files left out, no images by their suffix (.jpg, ")
    assert problem.message.endswith(f": {names}, ...")
