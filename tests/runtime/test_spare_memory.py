"""Memory is asked for before what does not survive the lack of it: Pillow's codecs, and threads that begin."""

import re
from pathlib import Path

import matplotlib.figure
import pytest
import torch
from PIL import Image
from rich.console import Console

import signal_reid
from signal_reid.data import make_train_loader, open_dataset
from signal_reid.data.images import deep_values, read_image
from signal_reid.data.synthetic import synthesize
from signal_reid.figures import png_bytes
from signal_reid.report.images import PageImages
from signal_reid.runtime import spare_memory
from signal_reid.runtime.console import progress_bar
from signal_reid.runtime.threads import map_in_pool

PACKAGE = Path(signal_reid.__file__).parent
LIMIT = """
import os, resource
from signal_reid.data.images import read_image
from signal_reid.runtime.spare_memory import require_memory
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 2**25, size + 2**25))
"""
"""Leaves 32 MiB."""


def test_what_is_asked_for_is_given_back(forking):
    ended = forking.run(LIMIT + "for _ in range(3): require_memory(2**24)")
    assert ended.returncode == 0, ended.stderr


def test_an_image_that_there_is_no_memory_to_decode(forking, tmp_path):
    Image.new("RGB", (3000, 3000)).save(tmp_path / "large.png")  # 36 MB decoded
    ended = forking.run(f"{LIMIT}read_image(__import__('pathlib').Path({str(tmp_path / 'large.png')!r}))")
    assert ended.returncode == 1, ended.stderr
    assert "MemoryError" in ended.stderr.strip().splitlines()[-1]


@pytest.fixture
def no_memory(monkeypatch):
    def lack():
        def require(size):
            raise MemoryError(size)

        monkeypatch.setattr(spare_memory, "require_memory", require)
        monkeypatch.setattr("signal_reid.data.images.require_memory", require)

    return lack


def save_image(path, **options):
    Image.new(options.pop("mode", "RGB"), (4, 4)).save(path, **options)
    return path


def draw_bar():
    with progress_bar("work", Console(force_terminal=True)):
        pass


WORKS = {
    "decode": lambda folder: read_image(folder / "image.png"),
    "decode 16 bits": lambda folder: deep_values(folder / "deep.png"),
    "a page's image": lambda folder: PageImages(64).uri(torch.zeros(3, 4, 4, dtype=torch.uint8)),
    "a figure": lambda folder: png_bytes(matplotlib.figure.Figure()),
    "synthesize": lambda folder: synthesize("rgbnt201", folder / "data", train_identities=2, test_identities=2),
    "a pool": lambda folder: list(map_in_pool(abs, [1, 2], 2)),
    "a bar": lambda folder: draw_bar(),
}


@pytest.mark.parametrize("work", WORKS)
def test_memory_is_asked_for_first(work, no_memory, tmp_path):
    save_image(tmp_path / "image.png")
    save_image(tmp_path / "deep.png", mode="I;16")
    no_memory()
    with pytest.raises(MemoryError):
        WORKS[work](tmp_path)


def test_the_queues_of_workers_ask_for_it(no_memory, tiny_config, synthetic):
    config = tiny_config("rgbnt201", f"data.root={synthetic()}", "data.workers=1")
    loader = make_train_loader(config, open_dataset("rgbnt201", config.data.root))
    no_memory()
    with pytest.raises(MemoryError):
        next(iter(loader))


def test_whoever_starts_threads_or_opens_images_asks_for_memory():
    begins = re.compile(r"\b(ThreadPoolExecutor|Thread|Progress|SummaryWriter|DataLoader|Image\.open)\(|\.savefig\(")
    files = [path for path in PACKAGE.rglob("*.py") if begins.search(path.read_text())]
    assert len(files) > 5
    assert [path.name for path in files if "require_memory" not in path.read_text()] == []
