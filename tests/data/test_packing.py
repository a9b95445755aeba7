import json
import os
import pickle
import resource
import zlib

import pytest
import torch

from signal_reid.data.decoding import decode
from signal_reid.data.errors import DataError
from signal_reid.data.layouts import open_dataset
from signal_reid.data.loading import make_train_loader
from signal_reid.data.packing import _TRAILER, StalePackError, open_packed, pack, packed_path


@pytest.fixture
def packed(rgbnt201, make_config):
    return pack("rgbnt201", rgbnt201, make_config(rgbnt201))


def damage(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["rgbnt201", "rgbnt100", "msvr310"])
def test_reading_gives_what_decoding_gives(name, write_dataset, tmp_path, make_config):
    root = write_dataset(name, tmp_path)
    config = make_config(root, name)
    pack(name, root, config)
    images, dataset = open_packed(config), open_dataset(name, root)
    for split, interpolation in (
        (dataset.train, "bicubic"),
        (dataset.query, "bilinear"),
        (dataset.gallery, "bilinear"),
    ):
        read = images.read(images.rows(split, interpolation))
        assert torch.equal(read, torch.stack([decode(sample, (32, 16), interpolation) for sample in split]))


def test_samples_that_are_both_query_and_gallery_are_stored_once(packed, rgbnt201, make_config):
    assert open_packed(make_config(rgbnt201)).shape == (24, 3, 3, 32, 16)


def test_the_file_lies_in_the_dataset_unless_told_otherwise(packed, rgbnt201, make_config, tmp_path):
    assert packed == packed_path(rgbnt201, (32, 16))
    config = make_config(rgbnt201)
    other = pack("rgbnt201", rgbnt201, config, tmp_path / "elsewhere.packed")
    assert open_packed(config, other).path == other


def test_packing_reports_progress(rgbnt201, make_config):
    seen: list[tuple[int, int]] = []
    pack("rgbnt201", rgbnt201, make_config(rgbnt201), progress=lambda *done: seen.append(done))
    assert seen == [(done, 24) for done in range(1, 25)]


def test_an_unreadable_image_leaves_no_file(rgbnt201, make_config, truncate):
    truncate(rgbnt201 / "test" / "TI" / "000005_cam1_0_00.jpg")
    with pytest.raises(DataError, match=r"TI/000005_cam1_0_00.jpg"):
        pack("rgbnt201", rgbnt201, make_config(rgbnt201))
    assert sorted(os.listdir(rgbnt201)) == ["test", "train_171"]


def test_an_earlier_file_survives_a_failure(packed, rgbnt201, make_config, truncate):
    before = packed.read_bytes()
    truncate(rgbnt201 / "test" / "TI" / "000005_cam1_0_00.jpg")
    with pytest.raises(DataError):
        pack("rgbnt201", rgbnt201, make_config(rgbnt201))
    assert packed.read_bytes() == before


def test_no_packed_file_says_how_to_make_one(rgbnt201, make_config):
    with pytest.raises(FileNotFoundError, match=r"no such packed file; run `signal-reid data pack` first"):
        open_packed(make_config(rgbnt201))


def test_no_directory_for_the_file_is_named(rgbnt201, make_config, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such directory"):
        pack("rgbnt201", rgbnt201, make_config(rgbnt201), tmp_path / "nowhere" / "file.packed")


@pytest.mark.parametrize("left", [0, 10, 5000, -1])
def test_a_truncated_file_is_refused(left, packed, rgbnt201, make_config):
    packed.write_bytes(packed.read_bytes()[:left])
    with pytest.raises(DataError, match=r"run `signal-reid data pack` again"):
        open_packed(make_config(rgbnt201))


def test_a_damaged_index_is_refused(packed, rgbnt201, make_config):
    damage(packed, -100)
    with pytest.raises(DataError, match="index of this packed file is corrupt"):
        open_packed(make_config(rgbnt201))


def test_damaged_images_are_refused_when_they_are_read(packed, rgbnt201, make_config):
    damage(packed, 4096 + 3 * 3 * 32 * 16 + 7)
    images = open_packed(make_config(rgbnt201))
    images.read([0, 2])
    with pytest.raises(DataError, match="row 1 are corrupt"):
        images.read([0, 1])


def test_a_worker_process_says_what_is_damaged(packed, rgbnt201, make_config):
    damage(packed, 4096 + 7)
    loader = make_train_loader(make_config(rgbnt201, cache="packed", workers=1), open_dataset("rgbnt201", rgbnt201))
    with pytest.raises(StalePackError) as raised:
        [list(loader) for _ in range(20)]  # until an epoch deals the damaged row
    assert (raised.value.path, raised.value.reason) == (packed, "the images of row 0 are corrupt")
    assert str(raised.value) == f"{packed}: the images of row 0 are corrupt; run `signal-reid data pack` again"


def test_a_changed_source_is_named(packed, rgbnt201, make_config):
    path = rgbnt201 / "train_171" / "NI" / "000001_cam1_0_00.jpg"
    os.utime(path, ns=(0, 12345))
    with pytest.raises(DataError, match=r"NI/000001_cam1_0_00.jpg has changed .* run `signal-reid data pack` again"):
        open_packed(make_config(rgbnt201))


def test_a_removed_source_is_named(packed, rgbnt201, make_config):
    (rgbnt201 / "train_171" / "NI" / "000001_cam1_0_00.jpg").unlink()
    with pytest.raises(DataError, match=r"NI/000001_cam1_0_00.jpg is gone"):
        open_packed(make_config(rgbnt201))


def test_a_new_sample_is_named(packed, rgbnt201, make_config):
    for modality in ("RGB", "NI", "TI"):
        folder = rgbnt201 / "train_171" / modality
        (folder / "000001_cam3_0_00.jpg").write_bytes((folder / "000001_cam1_0_00.jpg").read_bytes())
    images = open_packed(make_config(rgbnt201))
    with pytest.raises(DataError, match=r"000001_cam3_0_00.jpg \(bicubic\) is not in it"):
        images.rows(open_dataset("rgbnt201", rgbnt201).train, "bicubic")


def test_another_image_size_is_refused(packed, rgbnt201, make_config):
    with pytest.raises(DataError, match=r"packed at image_size \(32, 16\), expected \(64, 32\)"):
        open_packed(make_config(rgbnt201, image_size=[64, 32]), packed)


def test_rebuilding_packs_again_when_a_source_has_changed(packed, rgbnt201, make_config):
    path = rgbnt201 / "train_171" / "NI" / "000001_cam1_0_00.jpg"
    path.write_bytes((rgbnt201 / "train_171" / "TI" / "000003_cam1_0_00.jpg").read_bytes())
    config = make_config(rgbnt201)
    images = open_packed(config, rebuild=True)
    sample = open_dataset("rgbnt201", rgbnt201).train[0]
    assert torch.equal(images.read(images.rows([sample], "bicubic"))[0], decode(sample, (32, 16)))


def test_rebuilding_says_what_was_wrong(packed, rgbnt201, make_config, caplog):
    os.utime(rgbnt201 / "train_171" / "NI" / "000001_cam1_0_00.jpg", ns=(0, 12345))
    open_packed(make_config(rgbnt201), rebuild=True)
    (record,) = caplog.records
    assert record.getMessage().endswith("000001_cam1_0_00.jpg has changed since it was packed; packing it again")


def test_rebuilding_adds_new_samples(packed, rgbnt201, make_config):
    for modality in ("RGB", "NI", "TI"):
        folder = rgbnt201 / "train_171" / modality
        (folder / "000001_cam3_0_00.jpg").write_bytes((folder / "000001_cam1_0_00.jpg").read_bytes())
    assert open_packed(make_config(rgbnt201), rebuild=True).shape[0] == 25


@pytest.mark.parametrize("left", [0, 10, 5000, -1])
def test_rebuilding_replaces_a_truncated_file(left, packed, rgbnt201, make_config):
    whole = packed.read_bytes()
    packed.write_bytes(whole[:left])
    open_packed(make_config(rgbnt201), rebuild=True)
    assert packed.read_bytes() == whole


def test_rebuilding_does_not_make_a_file_that_never_was(rgbnt201, make_config):
    with pytest.raises(FileNotFoundError, match="no such packed file"):
        open_packed(make_config(rgbnt201), rebuild=True)


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(packed, rgbnt201, make_config):
    before, limits = packed.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match="what was there before is untouched"):
            pack("rgbnt201", rgbnt201, make_config(rgbnt201))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert packed.read_bytes() == before
    assert sorted(os.listdir(rgbnt201)) == [packed.name, "test", "train_171"]


def test_rebuilding_leaves_a_good_file_alone(packed, rgbnt201, make_config):
    before = packed.stat().st_mtime_ns
    open_packed(make_config(rgbnt201), rebuild=True)
    assert packed.stat().st_mtime_ns == before


def test_an_open_file_travels_to_a_worker_without_its_pixels(packed, rgbnt201, make_config):
    images = open_packed(make_config(rgbnt201))
    expected = images.read([3])
    sent = pickle.dumps(images)
    assert len(sent) < 20_000
    assert torch.equal(pickle.loads(sent).read([3]), expected)


def test_an_index_of_another_structure_behind_its_checksum_is_refused(packed, rgbnt201, make_config):
    content, config = packed.read_bytes(), make_config(rgbnt201)
    offset, length, _, end = _TRAILER.unpack(content[-_TRAILER.size :])
    index = json.loads(content[offset : offset + length])
    row = index["rows"][0]
    changes = [
        *({"image_size": value} for value in (3, [32], [32, "16"], [0, 16], [2**62, 2**62])),
        *({"modalities": value} for value in (None, 0, 2**62, "3")),
        *({"rows": value} for value in (None, {}, [3], [[]], [[*row, 1]], [[[], *row[1:]]], [[*row[:2], "x"]])),
        *({"sources": value} for value in (None, [], {"a": 3}, {"\0": [1, 2]}, {"a" * 300: [1, 2]})),
        *({"data_bytes": value} for value in (None, -1, 1, 2**70)),
    ]
    for text in (b"3", b"[" * 100_000, b"{}", *(json.dumps(index | change).encode() for change in changes)):
        trailer = _TRAILER.pack(offset, len(text), zlib.crc32(text), end)
        packed.write_bytes(content[:offset] + text + trailer)
        with pytest.raises(StalePackError):
            open_packed(config)


def test_a_file_of_another_number_of_modalities_is_refused(packed, rgbnt201, make_config):
    content, config = packed.read_bytes(), make_config(rgbnt201)
    offset, length, _, end = _TRAILER.unpack(content[-_TRAILER.size :])
    index = json.loads(content[offset : offset + length])
    index |= {"modalities": 1, "data_bytes": index["data_bytes"] // 3}
    start, text = len(content[:offset]) - 2 * index["data_bytes"], json.dumps(index).encode()
    packed.write_bytes(content[:start] + text + _TRAILER.pack(start, len(text), zlib.crc32(text), end))
    samples = open_dataset("rgbnt201", rgbnt201).query
    with pytest.raises(StalePackError, match=r"packed with 1 modalities, expected 3; run `signal-reid data pack`"):
        open_packed(config).rows(samples, "bilinear")
