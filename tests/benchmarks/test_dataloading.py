"""The benchmark of loading compares every batch and pixel first. The checkout here is a made-up one."""

import json

import pytest
import torch
from PIL import Image

SMALL = ["--identities", "2", "--images", "4", "--batch", "4", "--instances", "2", "--runs", "1", "--warmup", "0"]
SMALL += ["--device", "cpu", "--threads", "1"]


@pytest.fixture
def dataloading(script):
    return script("dataloading")


@pytest.fixture
def checkout(tmp_path):
    """Loaders that read the files in the order of their names and take torchvision from wherever it is."""
    files = {
        "config/__init__.py": (
            "import sys\nfrom yacs.config import CfgNode as N\n"
            "cfg = N(DATASETS=N(), DATALOADER=N(), SOLVER=N(), TEST=N(),\n"
            "        INPUT=N(PROB=0.5, RE_PROB=0.5, PADDING=10, MEAN=[0.5] * 3))\n"
        ),
        "configs/RGBNT201/Signal.yml": "INPUT:\n  PADDING: 10\n",
        "data/__init__.py": (
            "import os, torch, torchvision.transforms as T\nfrom PIL import Image\n"
            "def loader(folder, size, config, mode):\n"
            "    names = sorted(os.listdir(os.path.join(folder, 'RGB')))\n"
            "    steps = [T.Resize(size, interpolation=mode), T.RandomHorizontalFlip(p=config.PROB)]\n"
            "    steps += [T.Pad(config.PADDING), T.RandomCrop(size), T.ToTensor()]\n"
            "    steps += [T.Normalize(mean=config.MEAN, std=config.MEAN)]\n"
            "    read = lambda m, name: T.Compose(steps)(Image.open(os.path.join(folder, m, name)).convert('RGB'))\n"
            "    images = {m: torch.stack([read(m, name) for name in names]) for m in ('RGB', 'NI', 'TI')}\n"
            "    return [(images, torch.zeros(len(names)), names)]\n"
            "def make_dataloader(cfg):\n"
            "    root = os.path.join(cfg.DATASETS.ROOT_DIR, '512', 'data', 'RGBNT201')\n"
            "    size = cfg.INPUT.SIZE_TRAIN\n"
            "    train = loader(os.path.join(root, 'train_171'), size, cfg.INPUT, 3)\n"
            "    plain = cfg.clone().INPUT\n"
            "    plain.PROB = plain.PADDING = 0\n"
            "    return train, None, loader(os.path.join(root, 'test'), size, plain, 2), 1, 2, 3, 4\n"
        ),
    }
    for name, text in files.items():
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "checkout"


def test_every_cache_is_timed_beside_the_authors_loader(dataloading, checkout, tmp_path):
    assert dataloading.main([*SMALL, "--upstream", str(checkout), "--json", str(tmp_path / "out.json")]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["loader"] for row in rows[:2]] == ["upstream, with augmentation", "upstream"]
    assert [row["cache"] for row in rows[2:]] == ["none", "none", "ram", "ram", "packed", "packed"]
    assert all(row["triplets_per_s"] > 0 and row["triplets"] == 8 for row in rows)
    assert all("speedup" in row and "same_work" in row for row in rows[2:])
    assert all(row["speedup"] == row["same_work"] for row in rows[3::2])


def test_other_pixels_are_reported_without_a_time(dataloading, checkout, tmp_path, capsys):
    code = checkout / "data" / "__init__.py"
    code.write_text(code.read_text().replace("cfg.INPUT, 3)", "cfg.INPUT, 2)"))
    assert dataloading.main([*SMALL, "--upstream", str(checkout), "--json", str(tmp_path / "out.json")]) == 1
    output = capsys.readouterr()
    assert "jpg: pixels differ by" in output.err
    assert "_ms" not in output.out
    assert not (tmp_path / "out.json").exists()


def test_other_batches_are_reported_without_a_time(dataloading, monkeypatch, capsys):
    read = dataloading.open_packed.__globals__["PackedImages"].read
    monkeypatch.setattr("signal_reid.data.packing.PackedImages.read", lambda self, rows: read(self, rows) ^ 1)
    assert dataloading.main(SMALL) == 1
    assert capsys.readouterr().err == "error: packed: batches are not those of decoding; no time is reported\n"


def test_a_batch_that_instances_do_not_divide_is_refused(dataloading, capsys):
    assert dataloading.main([*SMALL, "--batch", "5"]) == 2
    assert capsys.readouterr().err == "error: --batch must be a multiple of --instances (2), got 5\n"


def test_stand_in_transforms_do_what_their_names_say(script):
    transforms = script("harness.torchvision_transforms")
    image = Image.effect_noise((8, 6), 50).convert("RGB")
    pixels = transforms.ToTensor()(image)
    assert pixels.shape == (3, 6, 8)
    assert torch.equal(transforms.ToTensor()(transforms.RandomHorizontalFlip(1.0)(image)), pixels.flip(-1))
    assert transforms.RandomHorizontalFlip(0.0)(image) is image
    padded = transforms.ToTensor()(transforms.Pad(2)(image))
    assert padded.shape == (3, 10, 12)
    assert torch.equal(padded[:, 2:8, 2:10], pixels)
    assert padded.sum() == pixels.sum()
    assert transforms.RandomCrop((6, 8))(transforms.Pad(2)(image)).size == (8, 6)
    assert transforms.Resize((3, 4))(image).size == (4, 3)
    expected = (pixels - torch.tensor([0.5, 0.25, 0]).view(3, 1, 1)) / 2
    assert torch.equal(transforms.Normalize([0.5, 0.25, 0], [2, 2, 2])(pixels), expected)
