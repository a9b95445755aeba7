import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from signal_reid.data.decoding import decode, decode_into
from signal_reid.data.errors import DataError
from signal_reid.data.images import read_image
from signal_reid.data.layouts import ImageSource, Sample, open_dataset


def as_array(images: torch.Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_each_modality_is_resized_as_pillow_does(interpolation, rgbnt201):
    sample = open_dataset("rgbnt201", rgbnt201).train[0]
    images = decode(sample, (20, 12), interpolation)
    assert images.shape == (3, 3, 20, 12)
    assert images.dtype == torch.uint8
    for image, source in zip(as_array(images), sample.sources, strict=True):
        with Image.open(source.path) as original:
            expected = original.resize((12, 20), Image.Resampling[interpolation.upper()])
        assert np.array_equal(image, np.asarray(expected))


def test_a_composite_is_cut_before_it_is_resized(rgbnt100):
    sample = open_dataset("rgbnt100", rgbnt100).train[0]
    with Image.open(sample.sources[0].path) as composite:
        parts = [composite.crop(source.box).resize((64, 32), Image.Resampling.BICUBIC) for source in sample.sources]
    assert np.array_equal(as_array(decode(sample, (32, 64))), np.stack([np.asarray(part) for part in parts]))


def test_grey_and_palette_images_become_rgb(tmp_path):
    sources = []
    for mode in ("L", "P", "RGBA"):
        path = tmp_path / f"{mode}.png"
        Image.new("RGB", (8, 8), (102, 102, 102)).convert(mode).save(path)
        sources.append(ImageSource(path))
    images = decode(Sample(1, 0, -1, tuple(sources), "grey"), (8, 8))
    assert images.unique().tolist() == [102]


def test_an_image_deeper_than_8_bits_is_refused(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(path)
    with pytest.raises(DataError, match=r"deep.png: image mode I.* deeper than 8 bits"):
        read_image(path)


def test_a_truncated_image_is_named(rgbnt201, truncate):
    sample = open_dataset("rgbnt201", rgbnt201).train[0]
    truncate(sample.sources[1].path)
    with pytest.raises(DataError, match=r"NI/000001_cam1_0_00.jpg: unreadable image \(.*truncated"):
        decode(sample, (32, 16))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_an_image_cut_anywhere_in_its_pixels_is_named(suffix, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    for length in range(len(content) - 24):
        path.write_bytes(content[:length])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: "):
            read_image(path)


def test_a_file_that_is_no_image_is_named(tmp_path):
    path = tmp_path / "text.jpg"
    path.write_text("not a picture")
    with pytest.raises(DataError, match=r"text.jpg: not an image"):
        read_image(path)


def png_header(width, height):
    """A PNG of one bit a pixel whose pixels are not there."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunk = b"IHDR" + header
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">II", zlib.crc32(chunk), 1) + b"IDAT"


@pytest.mark.parametrize("size", [(13_300, 13_300), (9_000, 9_000), (70_000, 1), (1, 2**25)])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_small_file_of_a_large_image_is_refused_unread(size, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(DataError, match=rf"bomb.png: an image of {size[0]}x{size[1]} pixels, more than"):
        read_image(path)


def test_a_frame_of_an_8k_camera_is_read(tmp_path):
    path = tmp_path / "frame.png"
    Image.new("1", (7680, 4320)).save(path)
    assert read_image(path).size == (7680, 4320)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"%PDF-1.4\n"])
def test_formats_that_pillow_runs_other_programs_for_are_no_images(content, tmp_path):
    path = tmp_path / "script.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"script.jpg: not an image"):
        read_image(path)


def test_a_file_that_is_gone_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone.jpg: unreadable image \(No such file"):
        read_image(tmp_path / "gone.jpg")


@pytest.mark.parametrize("size", [(767, 128), (768, 127), (512, 128), (1024, 128)])
def test_a_composite_of_another_size_is_refused(size, rgbnt100):
    sample = open_dataset("rgbnt100", rgbnt100).train[0]
    Image.new("RGB", size).save(sample.sources[0].path)
    with pytest.raises(DataError, match=rf"must be 768x128 pixels, got {size[0]}x{size[1]}"):
        decode(sample, (128, 256))


def test_errors_are_one_line(rgbnt201, truncate):
    sample = open_dataset("rgbnt201", rgbnt201).train[0]
    truncate(sample.sources[0].path)
    with pytest.raises(DataError) as caught:
        decode(sample, (32, 16))
    assert len(str(caught.value).splitlines()) == 1


def test_decoding_many_reports_progress_and_the_first_error_in_order(rgbnt201, truncate):
    samples = open_dataset("rgbnt201", rgbnt201).train
    out = torch.zeros(12, 3, 3, 32, 16, dtype=torch.uint8)
    seen: list[tuple[int, int]] = []
    decode_into(out, samples, "bicubic", lambda done, total: seen.append((done, total)))
    assert seen == [(done, 12) for done in range(1, 13)]
    assert torch.equal(out[7], decode(samples[7], (32, 16), "bicubic"))
    truncate(samples[9].sources[0].path)
    truncate(samples[4].sources[2].path)
    with pytest.raises(DataError, match=f"TI/{samples[4].name}"):
        decode_into(out, samples, "bicubic")
