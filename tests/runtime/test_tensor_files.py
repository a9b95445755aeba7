"""A safetensors file of ours is as it was written, or is refused."""

import random

import pytest
import safetensors.torch
import torch

from signal_reid.runtime import tensor_files

TENSORS = {"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5)}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "file.safetensors"
    path.write_bytes(tensor_files.serialise(TENSORS, {"format": "pt", "note": '"crc32":"00000000" in a text'}))
    return path


def test_what_was_written_is_read(path):
    tensor_files.check(path)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata()["note"] == '"crc32":"00000000" in a text'
        assert torch.equal(file.get_tensor("a"), TENSORS["a"])


def test_a_path_that_is_not_utf_8_is_read(path):
    odd = path.with_name("caf\udce9.safetensors")
    path.rename(odd)
    tensors, metadata = tensor_files.read(odd)
    assert torch.equal(tensors["a"], TENSORS["a"])
    assert metadata["format"] == "pt"


@pytest.mark.parametrize("read", [tensor_files.read, tensor_files.read_metadata])
@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("unable to open file <{}> in read-only mode: No such file or directory (2)", FileNotFoundError),
        ("unable to mmap 60 bytes from file <{}>: Cannot allocate memory (12)", OSError),
        ("no file at all", RuntimeError),
    ],
)
def test_what_pytorch_says_of_a_file_that_it_cannot_map_is_an_error_of_the_system(read, said, kind, path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError(said.format(path))

    monkeypatch.setattr("safetensors.safe_open", refuse)
    with pytest.raises(kind) as caught:
        read(path)
    assert kind is RuntimeError or caught.value.filename == str(path)


def test_a_flipped_bit_is_found_wherever_it_is(path):
    content = path.read_bytes()
    chosen = random.Random(0)
    unseen = []
    for bit in [*range(8 * len(content) - 8 * 88, 8 * len(content)), *chosen.sample(range(8 * len(content)), 300)]:
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensor_files.check(path)
            read = safetensors.torch.load_file(path)
        except (tensor_files.DamagedFileError, safetensors.SafetensorError):
            continue
        unseen.append(bit)
        assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    assert len(unseen) < 10  # in the name of the checksum alone, without which a file is read as another program's


def test_a_file_of_another_program_has_no_checksum(path):
    safetensors.torch.save_file(TENSORS, path, {"format": "pt"})
    tensor_files.check(path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\xff" * 7 + b"\x7f{", b"\x02" + bytes(7) + b"{}"])
def test_no_safetensors_file_is_left_to_the_reader(content, path):
    path.write_bytes(content)
    tensor_files.check(path)
