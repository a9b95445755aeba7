"""Images as they are: what becomes of more than 8 bits, transparency and EXIF, and where the mapping is stated."""

import errno

import numpy as np
import pytest
import torch
from PIL import Image

from signal_reid.config import ConfigError, dump_config, load_config
from signal_reid.data import decode, open_configured
from signal_reid.data.depth import with_measured_ranges
from signal_reid.data.errors import DataError
from signal_reid.data.images import deep_values, develop, read_image
from signal_reid.data.layouts import Reading
from signal_reid.data.packing import StalePackError, open_packed, pack

DEEP = np.array([[0, 1000], [1500, 3000]])
LACK = {
    "files": OSError(errno.EMFILE, "Too many open files"),
    "memory": OSError(errno.ENOMEM, "Cannot allocate memory"),
}


@pytest.mark.parametrize("lack", LACK)
@pytest.mark.parametrize("read", [read_image, deep_values])
def test_what_the_machine_lacks_is_not_the_image_s_fault(lack, read, monkeypatch, tmp_path):
    def fail(*_, **__):
        raise LACK[lack]

    Image.fromarray(DEEP.astype("<u2")).save(tmp_path / "deep.png")
    for function in ("PIL.PngImagePlugin.PngImageFile.load", "PIL.Image.open"):
        monkeypatch.setattr(function, fail)
        with pytest.raises(OSError, match=LACK[lack].args[-1]):
            read(tmp_path / "deep.png")


@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", "<u2"), ("tif", "<u2"), ("tif", ">u2"), ("tif", "<f4"), ("tif", "<i4")]
)
def test_deep_images_are_mapped_linearly_between_the_range(suffix, dtype, tmp_path):
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(DEEP.astype(dtype)).save(path)
    image = np.asarray(read_image(path, Reading(range=(1000, 2000))))
    assert image.tolist() == [[[0] * 3, [0] * 3], [[128] * 3, [255] * 3]]


def test_values_that_are_no_numbers_are_refused(tmp_path):
    Image.fromarray(np.array([[np.nan, 1]], np.float32)).save(tmp_path / "deep.tif")
    with pytest.raises(DataError, match=r"deep.tif: holds values that are no finite numbers"):
        read_image(tmp_path / "deep.tif", Reading(range=(0, 1)))


@pytest.mark.parametrize("enough", [False, True])
def test_a_damaged_image_that_asks_for_too_much_is_told_from_a_machine_without_memory(enough, monkeypatch, tmp_path):
    def fail(*_):
        raise MemoryError

    def require(*_):
        if not enough:
            raise MemoryError

    Image.fromarray(DEEP.astype("<u2")).save(tmp_path / "deep.png")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", fail)
    monkeypatch.setattr("signal_reid.data.images.require_memory", require)
    with pytest.raises(DataError if enough else MemoryError) as caught:
        read_image(tmp_path / "deep.png", Reading(range=(0, 1)))
    if enough:
        assert str(caught.value).endswith("deep.png: unreadable image (it asks for too much memory)")
        assert deep_values(tmp_path / "deep.png") is None


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composited_on_the_stated_colour(mode, tmp_path):
    image = Image.new("RGBA", (4, 4), (200, 200, 200, 255))
    image.putpixel((0, 0), (200, 200, 200, 0))
    image.convert(mode).save(tmp_path / "clear.png")
    image, traits = develop(tmp_path / "clear.png", Reading(background=(255, 0, 7)))
    assert image.getpixel((0, 0)) == (255, 0, 7)
    assert image.getpixel((1, 1)) == (200, 200, 200)
    assert traits == ("transparent",)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_what_exif_says_is_applied_or_refused(suffix, orientation, tmp_path):
    upright = np.zeros((32, 16, 3), np.uint8)
    upright[:16, :8] = 255  # the upper left quarter is white
    back = {1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud, 5: lambda a: a.transpose(1, 0, 2),
            6: np.rot90, 7: lambda a: np.rot90(a, 2).transpose(1, 0, 2), 8: lambda a: np.rot90(a, 3)}  # fmt: skip
    exif, path = Image.Exif(), tmp_path / f"turned.{suffix}"
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(back[orientation](upright))).save(path, exif=exif)
    image = read_image(path)
    assert image.size == (16, 32)
    assert [image.getpixel(place)[0] > 127 for place in ((2, 2), (12, 2), (2, 28), (12, 28))] == [
        True,
        False,
        False,
        False,
    ]
    if orientation > 1:
        with pytest.raises(
            DataError, match=rf"turned.{suffix}: rotated or mirrored by EXIF; data.images.orientation=apply"
        ):
            read_image(path, Reading(orientation="refuse"))


@pytest.mark.parametrize("suffix", ["bmp", "tif", "tiff", "webp"])
def test_other_suffixes_are_images_too(suffix, rgbnt201, make_config):
    for modality in ("RGB", "NI", "TI"):
        path = rgbnt201 / "train_171" / modality / "000001_cam1_0_00.jpg"
        Image.open(path).save(path.with_suffix(f".{suffix}"))
        path.unlink()
    dataset = open_configured(make_config(rgbnt201))
    assert dataset.train[0].name == f"000001_cam1_0_00.{suffix}"
    assert len(dataset.train) == 12
    decode(dataset.train[0], (8, 8))


@pytest.fixture
def thermal(rgbnt201):
    """A data set whose thermal images have 12 bits in 16: values 1000 to 1255, in the test split 40 more."""
    for split in ("train_171", "test"):
        for path in sorted((rgbnt201 / split / "TI").glob("*.jpg")):
            values = np.linspace(1000, 1255, 32 * 16).reshape(32, 16) + (0 if split == "train_171" else 40)
            Image.fromarray(values.astype(np.uint16)).save(path.with_suffix(".png"))
            path.unlink()
    return rgbnt201


def test_a_deep_modality_without_a_range_says_what_to_set(thermal, make_config):
    dataset = open_configured(make_config(thermal))
    with pytest.raises(DataError, match=r"deeper than 8 bits; data.images.ranges=\{MODALITY: \[LOW, HIGH\]\}"):
        decode(dataset.train[0], (8, 8))


def test_measured_ranges_are_written_and_read_back_to_the_same_images(thermal, make_config):
    config = make_config(thermal, images={"percentiles": [0, 100]})
    measured = with_measured_ranges(config)
    assert measured.data.images.ranges == {"TI": (1000.0, 1255.0)}
    again = load_config({**measured.model_dump(), "output": "elsewhere"})
    assert again.data == measured.data
    assert with_measured_ranges(again) == again
    dataset = open_configured(again)
    train, test = (decode(split[0], (32, 16), "bilinear") for split in (dataset.train, dataset.query))
    assert train[2].min() == 0
    assert train[2].max() == 255
    assert test[2].min() == 40  # by the training's range, not its own
    assert "TI: [1000.0, 1255.0]" in dump_config(measured)


def test_a_packed_file_holds_what_the_measured_range_makes(thermal, make_config):
    pack("rgbnt201", thermal, make_config("elsewhere", images={"percentiles": [0, 100]}))
    measured = with_measured_ranges(make_config(thermal, images={"percentiles": [0, 100]}))
    dataset, images = open_configured(measured), open_packed(measured)
    read = images.read(images.rows(dataset.train, "bicubic"))
    assert torch.equal(read, torch.stack([decode(sample, (32, 16)) for sample in dataset.train]))
    other = open_configured(make_config(thermal, images={"ranges": {"TI": [0, 2000]}}))
    with pytest.raises(StalePackError, match="is not in it"):
        images.rows(other.train, "bicubic")


def test_eight_bits_are_left_alone_whatever_the_range(rgbnt201, make_config):
    plain, ranged = (make_config(rgbnt201, images=images) for images in ({}, {"ranges": {"RGB": [0, 10]}}))
    one, other = (decode(open_configured(config).train[0], (8, 8)) for config in (plain, ranged))
    assert torch.equal(one, other)
    assert with_measured_ranges(make_config(rgbnt201, images={"percentiles": [1, 99]})).data.images.ranges is None


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ({"ranges": {"TI": [5, 5]}}, "ranges must be lowest, highest value of a modality"),
        ({"percentiles": [99, 1]}, "percentiles must be two of 0 to 100, the lower first"),
        ({"background": [0, 0, 256]}, "background must be red, green, blue from 0 to 255"),
    ],
)
def test_settings_that_mean_nothing_are_refused(images, message, rgbnt201, make_config):
    with pytest.raises(ConfigError, match=f"data.images.{message}"):
        make_config(rgbnt201, images=images)
