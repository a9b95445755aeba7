"""Files that are damaged and read: each is as it was, or is refused in one line."""

from __future__ import annotations

import io
import json
import random
import struct
import warnings
import zipfile
import zlib
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from damage import NUMBERS, SETTINGS, Try, damaged, refused_or, with_value
from PIL import Image

import signal_reid
from signal_reid import checkpoints
from signal_reid.checkpoints.reading import read
from signal_reid.data import check_dataset, open_dataset, packing
from signal_reid.data.images import FORMATS, deep_values, read_image
from signal_reid.data.layouts import ImageSource
from signal_reid.data.layouts.options import Reading
from signal_reid.data.manifests import split_manifest
from signal_reid.data.tables import write_table
from signal_reid.evaluation import FeatureSet, load_features, save_features
from signal_reid.report.run_report import load_baselines
from signal_reid.runtime import tensor_files
from signal_reid.search import segments
from signal_reid.search.calibration import Threshold
from signal_reid.search.index import FILE, Description, Index
from signal_reid.search.segments import Entry, Segment
from signal_reid.search.sources import find_entries
from signal_reid.training.run_directory import RunDirectory


def checkpoint_files(folder: Path) -> Try:
    """Archives of every kind, their records behind right checksums, and safetensors."""
    model = signal_reid.build_model(signal_reid.load_config("rgbnt201", SETTINGS), 4, 2)
    state = {name: value for name, value in model.state_dict().items() if value.numel() < 4000}
    files = {
        "a.safetensors": tensor_files.serialise(
            state, {"signal_reid": "1", "num_identities": "4", "config": "output: a"}
        )
    }
    for name, options in (("a.pt", {}), ("legacy.pt", {"_use_new_zipfile_serialization": False})):
        buffer = io.BytesIO()
        torch.save({"model": state, "rank1": np.float64(0.5)}, buffer, **options)
        files[name] = buffer.getvalue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        buffer = io.BytesIO()
        torch.jit.save(torch.jit.script(torch.nn.BatchNorm1d(3)), buffer)
    files["script.pt"] = buffer.getvalue()

    def once(draw: random.Random) -> None:
        name, content = draw.choice(list(files.items()))
        path = folder / name
        if name in ("a.pt", "script.pt") and draw.random() < 0.7:
            content = with_record(content, draw)
        else:
            content = damaged(content, draw)
        path.write_bytes(content)
        read(path)
        checkpoints.describe(path)
        checkpoints.load(model, path)

    return once


def with_record(content: bytes, draw: random.Random) -> bytes:
    """An archive with one of its records damaged, most often the pickle, behind a right checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        names = old.namelist()
        pickles = [name for name in names if name.endswith("data.pkl")]
        chosen = draw.choice(pickles if draw.random() < 0.8 else names)
        for name in names:
            record = old.read(name)
            new.writestr(name, damaged(record, draw) if name == chosen else record)
    return buffer.getvalue()


def features(folder: Path) -> Try:
    """Feature files, behind right checksums or none."""
    path, rows = folder / "a.safetensors", torch.arange(3)
    save_features(path, FeatureSet(torch.ones(3, 2), rows, rows), ["a", "b", "c"])
    content = path.read_bytes()
    plain = safetensors.torch.save(safetensors.torch.load(content))

    def once(draw: random.Random) -> None:
        path.write_bytes(damaged(draw.choice((content, plain)), draw))
        load_features(path)

    return once


def packed(folder: Path) -> Try:
    """Packed files, their index behind a right checksum."""
    index = {"dataset": "a", "image_size": [4, 2], "modalities": 3, "data_bytes": 72, "sources": {}}
    index["rows"] = [["a.jpg", "bicubic", 0]]
    start = packing._MAGIC.ljust(packing._DATA_OFFSET, b"\0") + bytes(72)
    path = folder / "a.packed"

    def once(draw: random.Random) -> None:
        text = json.dumps(with_value(index, draw)).encode()
        text = damaged(text, draw) if draw.random() < 0.3 else text
        content = start + text + packing._TRAILER.pack(len(start), len(text), zlib.crc32(text), packing._END)
        path.write_bytes(damaged(content, draw) if draw.random() < 0.2 else content)
        packing.PackedImages(path, folder, (4, 2)).read([0])

    return once


def indexes(folder: Path) -> Try:
    """Indexes of shards and of features, rows of metrics and baselines."""
    safetensors.torch.save_file({"backbone.a": torch.zeros(2)}, folder / "one.safetensors")
    path, run = folder / "model.safetensors.index.json", RunDirectory(folder)
    row = {"kind": "step", "epoch": 1, "step": 1, "total": 0.5}
    headline = {"name": "a", "mAP": 0.1, "rank1": 0.1, "rank5": 0.1, "rank10": 0.1}
    searched = index_of_features(folder / "index")

    def once(draw: random.Random) -> None:
        for place, tree, use in (
            (path, {"metadata": {}, "weight_map": {"backbone.a": "one.safetensors"}}, lambda: read(path)),
            (run.metrics, row, run.rows),
            (run.baselines, [headline], lambda: load_baselines(run)),
        ):
            text = json.dumps(with_value(tree, draw)).encode()
            place.write_bytes((damaged(text, draw) if draw.random() < 0.5 else text) + b"\n")
            refused_or(use)
        searched(draw)

    return once


def index_of_features(folder: Path) -> Try:
    """What `index build` writes: the description and a segment, behind right checksums or none."""
    threshold = Threshold(0.5, 0.1, 0.9, 7, 3)
    made = Index.create(folder, Description("0" * 16, ("RGB", "TI"), 4, "fp32", threshold=threshold))
    sources = (ImageSource(folder / "a.jpg", (0, 0, 2, 2)), None)
    made.add([Entry(name, sources, 1, 2, "ada", "gate") for name in "abc"], [torch.eye(3, 4)])
    description = json.loads((folder / FILE).read_bytes())
    del description["crc32"]
    segment = folder / description["parts"][0]["file"]
    whole = segment.read_bytes()

    def once(draw: random.Random) -> None:
        how = draw.random()
        segment.write_bytes(damaged(whole, draw) if how < 0.2 else with_parts(whole, draw) if how < 0.7 else whole)
        tree = with_value(description, draw) if draw.random() < 0.7 else description
        if isinstance(tree, dict):
            tree = {**tree, "crc32": f"{zlib.crc32(json.dumps(tree, sort_keys=True).encode()):08x}"}
        text = json.dumps(tree).encode()
        (folder / FILE).write_bytes(damaged(text, draw) if draw.random() < 0.2 else text)
        refused_or(lambda: Segment(segment).check())
        index = Index(folder)
        index.check()
        index.search(torch.ones(2, 4), top=2)

    return once


def with_parts(content: bytes, draw: random.Random) -> bytes:
    """A segment of an index of features with a value of its header or a byte before the features changed.

    Its checksums are right.
    """
    (length,) = struct.unpack("<Q", content[:8])
    text, rest = content[8 : 8 + length], bytearray(content[8 + length :])
    header = json.loads(text)
    begin, _ = header["features"]["data_offsets"]
    first, _ = header["checksums"]["data_offsets"]
    if draw.random() < 0.5:
        text = json.dumps(with_value(header, draw)).encode()
    else:
        rest[draw.randrange(begin)] = draw.choice((*b'"0[]{}:,n', draw.randrange(256)))
    head = struct.pack("<Q", len(text)) + text
    checksums = np.frombuffer(rest[first:], "<i8") & 0xFFFFFFFF
    checksums[0] = zlib.crc32(head + rest[:begin])
    return head + rest[:first] + segments._chained(checksums).tobytes()


def yaml_files(folder: Path) -> Try:
    """Configurations in our naming and in the authors'."""
    ours = signal_reid.config.dump_config(signal_reid.load_config("rgbnt201")).encode()
    theirs = b"MODEL:\n  TRANSFORMER_TYPE: 'ViT-B-16'\n  DIRECT: 1\n  TOPK: 80\n  STRIDE_SIZE: [16, 16]\n"
    theirs += b"SOLVER:\n  BASE_LR: '3.5e-4'\n"
    path = folder / "a.yml"

    def once(draw: random.Random) -> None:
        path.write_bytes(damaged(draw.choice((ours, theirs)), draw))
        signal_reid.load_config(path)

    return once


def manifests(folder: Path) -> Try:
    """Manifests as data sets, as what is split again and as items of an index; lists of images."""
    (folder / "a.jpg").write_bytes(picture_file("JPEG"))
    rows = [["split", "identity", "camera", "scene", "RGB", "TI"]]
    for number, split in enumerate(("train", "train", "train", "test", "query", "gallery")):
        rows.append([split, str(number // 2), "0", "1", f"a.jpg#xywh={number},0,4,4", "a.jpg"])
    paths = [folder / "a.csv", folder / "a.txt", *([folder / "a.parquet"] if find_spec("pyarrow") else [])]

    def once(draw: random.Random) -> None:
        path = draw.choice(paths)
        table = with_cell(rows, draw) if draw.random() < 0.7 else rows
        if path.suffix == ".txt":
            path.write_bytes("\n".join("\t".join(cells[4:]) for cells in table[1:]).encode(errors="surrogateescape"))
        else:
            refused_or(partial(write_table, path, table[0], table[1:]))
        if draw.random() < 0.5:
            path.write_bytes(damaged(path.read_bytes(), draw))
        for problem in check_dataset("manifest", path):
            assert len(str(problem).splitlines()) == 1, problem
        refused_or(lambda: open_dataset("manifest", path))
        refused_or(lambda: split_manifest(path, folder / "other" / "b.csv"))
        find_entries(path, ("RGB", "TI"))

    (folder / "other").mkdir()
    return once


def with_cell(rows: list[list[str]], draw: random.Random) -> list[list[str]]:
    """A table with one to three cells replaced, most often by what is not meant to stand there."""
    rows = [list(cells) for cells in rows]
    for _ in range(draw.randint(1, 3)):
        cells = draw.choice(rows)
        texts = [
            "",
            " ",
            "x",
            "\0",
            "\n",
            "\udcff",
            '"',
            ",",
            ";",
            "a.jpg",
            ".",
            "/",
            "/dev/null",
            "a" * 5000,
            "9" * 5000,
        ]
        texts += [
            "a.jpg#xywh=9,9,0,0",
            "a.jpg#xywh=0,0,999999,999999",
            "#xywh=0,0,1,1",
            "test",
            "RGB",
            "-1",
            "²",
            "\u0663",
        ]
        cells[draw.randrange(len(cells))] = draw.choice((*texts, *map(str, NUMBERS)))
    return rows


def picture_file(format_: str, mode: str = "RGB", **options: object) -> bytes:
    """A small image file."""
    picture = np.random.default_rng(0).integers(0, 256, (24, 16, 4), dtype=np.uint8)
    if mode == "I;16":
        image = Image.fromarray(picture[:, :, 0].astype(np.uint16) * 256)
    elif mode == "F":
        image = Image.fromarray(picture[:, :, 0].astype(np.float32))
    else:
        image = Image.fromarray(picture).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def images(folder: Path) -> Try:
    """Image files of every format that is read, of 16 bits, with alpha, a palette and EXIF among them."""
    files = [picture_file(name) for name in FORMATS]
    files += [picture_file(*kind) for kind in (("TIFF", "I;16"), ("PNG", "I;16"), ("TIFF", "F"), ("PNG", "RGBA"))]
    files += [picture_file(*kind) for kind in (("PNG", "P"), ("JPEG", "CMYK"), ("WEBP", "RGBA"), ("TIFF", "CMYK"))]
    exif = Image.Exif()
    exif[0x0112] = 6
    files += [picture_file(name, exif=exif) for name in ("JPEG", "PNG", "TIFF", "WEBP")]
    path = folder / "a.jpg"
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF and the like

    def once(draw: random.Random) -> None:
        path.write_bytes(damaged(draw.choice(files), draw))
        deep_values(path)
        reading = Reading(draw.choice((None, (0.0, 65535.0))), (9, 9, 9), draw.choice(("apply", "refuse")))
        read_image(path, reading).resize((8, 16))

    return once
