"""A few seconds of the fuzzers, and small files that once asked for gigabytes."""

import os
import resource
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import pytest
import torch

from signal_reid import load_config
from signal_reid.checkpoints.reading import read
from signal_reid.data.images import read_image
from signal_reid.runtime.errors import UserError

sys.path.insert(0, str(Path(__file__).parent))  # of the fuzzer's own files, as where it is run as a program
import fuzz

TRIES = {"states": 25, "checkpoints": 40}


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_what_is_damaged_is_refused_in_one_line(kind):
    before = torch.get_rng_state()
    assert fuzz.fuzz(kind, seconds=20, most=TRIES.get(kind, 60)) > 0
    torch.set_rng_state(before)


def archive(path, program, storage=b""):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("a/data.pkl", program)
        file.writestr("a/data/0", storage)
    return path


def bombs(folder):
    """Files of less than 10 MB that would fill gigabytes, by what reads them."""
    yield read, archive(folder / "memo.pt", b"\x80\x02}r" + struct.pack("<I", 2**27) + b".")
    yield read, archive(folder / "lists.pt", b"\x80\x02" + b"]" * 9_000_000 + b".")
    yield read, archive(folder / "nested.pt", b"\x80\x02)" + b"\x85" * 400_000 + b".")
    bomb = folder / "bomb.pt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as file, file.open("a/data.pkl", "w") as record:
        for _ in range(128):
            record.write(bytes(2**20))
    yield read, bomb
    legacy = folder / "legacy.pt"
    torch.save({"a": torch.zeros(100)}, legacy, _use_new_zipfile_serialization=False)
    legacy.write_bytes(legacy.read_bytes().replace(b"KdN", b"J\xff\xff\xff\x7fN"))
    yield read, legacy
    many = folder / "many.pt"
    with zipfile.ZipFile(many, "w") as file:
        for number in range(3_000):
            file.writestr(str(number), b"")
    yield read, many
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": [' + "[]," * 1_000_000 + "[]]}")
    yield read, index
    for name, text in (("keys.yml", "".join(f"k{n}: 1\n" for n in range(100_000))), ("long.yml", "[" * 9_000_000)):
        (folder / name).write_text(text)
        yield load_config, folder / name
    picture = folder / "picture.png"
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(1 + 13_300 // 8 + 1)) for _ in range(13_300)) + rows.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", 13_300, 13_300, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    yield read_image, picture


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self/statm").exists(), reason="limits a forked process")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_file_below_10_mb_takes_less_than_1_gib(tmp_path):
    for use, path in bombs(tmp_path):
        assert path.stat().st_size < 10_000_000
        child = os.fork()
        if child == 0:
            os._exit(outcome(use, path))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, path.name


def outcome(use, path):
    """0 where a file is refused within 1 GiB more than the process has."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, size + 2**30))
    try:
        use(path)
    except UserError:
        return 0
    except BaseException as error:
        print(f"{path.name}: {type(error).__name__} {str(error)[:200]}", file=sys.stderr, flush=True)
    return 1
