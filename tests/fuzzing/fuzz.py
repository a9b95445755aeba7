"""Damages files and states at random: each is read as it was, or is refused in one line; nothing else may happen.

    PYTHONPATH=. python tests/fuzzing/fuzz.py KIND [--seconds 600] [--seed 0]

A finding prints the seed that repeats it (`--seed N --seconds 0`) and ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import random
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from PIL import Image

import signal_reid
from signal_reid import checkpoints, ops
from signal_reid.checkpoints.reading import read
from signal_reid.data import packing
from signal_reid.data.images import FORMATS, read_image
from signal_reid.evaluation import FeatureSet, load_features, save_features
from signal_reid.report.run_report import load_baselines
from signal_reid.runtime import tensor_files
from signal_reid.runtime.errors import UserError
from signal_reid.training import make_optimizer, training_state
from signal_reid.training.run_directory import RunDirectory

Try = Callable[[random.Random], None]

NUMBERS = (0, 1, -1, 127, 128, 255, 256, 2**15, 2**16, 2**27, 2**31 - 1, -(2**31), 2**32, 2**62, 2**63 - 1)
WORDS = (
    b"\0",
    b"\xff",
    b"[",
    b"{",
    b"-",
    b'"',
    b"\\",
    b":",
    b"*",
    b"&a ",
    b"!!",
    b"<<: ",
    b"\n",
    b"9" * 50,
    b"(",
    b"t",
    b"R",
    b"b",
    b"r",
)
SETTINGS = ["model.backbone.layers=1", "model.backbone.width=48", "model.backbone.heads=3", "model.k_intra=20"]
SETTINGS += ["model.backbone.patch_size=8", "model.backbone.stride=8", "model.backbone.output_dim=32"]
SETTINGS += ["data.image_size=[64,64]", "data.batch_size=8", "data.instances=2", "data.workers=0"]


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Content with one to four bits flipped, places overwritten, cut out, repeated or inserted."""
    data = bytearray(content)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(data) + 1)
        how = draw.randrange(6)
        if how == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[at : at + 8] = struct.pack("<q", draw.choice(NUMBERS))[: draw.choice((1, 2, 4, 8))]
        elif how == 2:
            del data[at : at + draw.choice((1, 2, 8, 100, len(data)))]
        elif how == 3:
            data[at:at] = draw.choice(WORDS) * draw.choice((1, 1, 1, 30, 3000))
        elif how == 4:
            start = draw.randrange(len(data) + 1)
            data[at:at] = data[start : start + draw.choice((1, 8, 50, 500))]
        elif at < len(data):
            data[at] = draw.randrange(256)
    return bytes(data)


def with_value(tree: object, draw: random.Random) -> object:
    """A tree of lists and dictionaries with one of its values replaced, dropped or moved elsewhere."""
    tree = copy.deepcopy(tree)
    places = [(None, None)]
    pending = [tree]
    while pending:
        item = pending.pop()
        entries = (
            list(item.items()) if isinstance(item, dict) else list(enumerate(item)) if isinstance(item, list) else []
        )
        places += [(item, key) for key, _ in entries]
        pending += [value for _, value in entries]
    holder, key = draw.choice(places)
    value = draw.choice(
        (None, True, *NUMBERS, 0.5, float("nan"), -1e300, 10**400, "", "x", "\udcff", [], {}, [[]], {"a": {}})
    )
    if holder is None:
        return value
    if draw.random() < 0.2:
        del holder[key]
    elif draw.random() < 0.2:
        other, place = draw.choice(places[1:])
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = value
    return tree


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


def states(folder: Path) -> Try:
    """Training states, restored and gone on with."""
    config = signal_reid.load_config("rgbnt201", SETTINGS)
    model = signal_reid.build_model(config, 4, 2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    path, scaler = folder / "checkpoint.pt", torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer = make_optimizer(model, config.optimizer)
    optimizer.step()
    progress = {"epoch": 1, "step": 1, "best_mAP": 0.1, "best_epoch": 1}
    training_state.save_training_state(path, model=model, optimizer=optimizer, scaler=scaler, progress=progress)
    whole = training_state.load_training_state(path)

    def once(draw: random.Random) -> None:
        parts = {**whole, "optimizer": with_tensor(whole["optimizer"], draw)} if draw.random() < 0.7 else whole
        parts = {
            **parts,
            **{name: with_value(parts[name], draw) for name in ("progress", "rng", "scaler") if draw.random() < 0.2},
        }
        torch.save({"format": training_state.FORMAT, "version": 1, **parts}, path)
        state = training_state.load_training_state(path)
        fresh = make_optimizer(model, config.optimizer)
        training_state.restore_training_state(state, model=model, optimizer=fresh, scaler=scaler)
        training_state.restore_rng(state["rng"])
        fresh.step()
        torch.randn(700)

    return once


def with_tensor(optimizer: dict, draw: random.Random) -> dict:
    """The state of an optimizer with one of its tensors in another shape, dtype or place, or another value changed."""
    if draw.random() < 0.3:
        return with_value(optimizer, draw)
    state = {index: dict(entries) for index, entries in optimizer["state"].items()}
    index = draw.choice(list(state))
    name = draw.choice(list(state[index]))
    value = state[index][name]
    shape = draw.choice(((), (0,), (1,), value.shape, value.shape[::-1], (*value.shape, 1), (value.numel(),)))
    dtype = draw.choice((torch.float32, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64))
    changed = torch.zeros(shape).to(dtype)
    if changed.ndim and draw.random() < 0.3:
        changed = (
            torch.zeros(1, dtype=dtype).expand(shape)
            if changed.numel()
            else changed.mT
            if changed.ndim > 1
            else changed
        )
    state[index][name] = changed
    return {**optimizer, "state": state}


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
    """Indexes of shards, rows of metrics and baselines."""
    safetensors.torch.save_file({"backbone.a": torch.zeros(2)}, folder / "one.safetensors")
    path, run = folder / "model.safetensors.index.json", RunDirectory(folder)
    row = {"kind": "step", "epoch": 1, "step": 1, "total": 0.5}
    headline = {"name": "a", "mAP": 0.1, "rank1": 0.1, "rank5": 0.1, "rank10": 0.1}

    def once(draw: random.Random) -> None:
        for place, tree, use in (
            (path, {"metadata": {}, "weight_map": {"backbone.a": "one.safetensors"}}, lambda: read(path)),
            (run.metrics, row, run.rows),
            (run.baselines, [headline], lambda: load_baselines(run)),
        ):
            text = json.dumps(with_value(tree, draw)).encode()
            place.write_bytes((damaged(text, draw) if draw.random() < 0.5 else text) + b"\n")
            refused_or(use)

    return once


def yaml_files(folder: Path) -> Try:
    """Configurations in our naming and in the authors'."""
    ours = signal_reid.config.dump_config(signal_reid.load_config("rgbnt201")).encode()
    theirs = b"MODEL:\n  DIRECT: 1\n  TOPK: 80\n  STRIDE_SIZE: [16, 16]\nSOLVER:\n  BASE_LR: '3.5e-4'\n"
    path = folder / "a.yml"

    def once(draw: random.Random) -> None:
        path.write_bytes(damaged(draw.choice((ours, theirs)), draw))
        signal_reid.load_config(path)

    return once


def images(folder: Path) -> Try:
    """Image files of every format that is read."""
    files, picture = [], np.random.default_rng(0).integers(0, 256, (24, 16, 3), dtype=np.uint8)
    for name in FORMATS:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, name)
        files.append(buffer.getvalue())
    path = folder / "a.jpg"
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF and the like

    def once(draw: random.Random) -> None:
        path.write_bytes(damaged(draw.choice(files), draw))
        read_image(path).resize((8, 16))

    return once


def operator_arguments() -> dict[str, tuple[Callable[..., object], dict[str, object]]]:
    """Every public operator with arguments that it takes, by their names."""
    normal = partial(torch.randn)
    mask = torch.rand(2, 3, 6) < 0.5
    parameters = {"bias": normal(2, 6), "window": normal(2, 6, 4, 4), "window_bias": normal(2, 6), "out": normal(2, 6)}
    queries = {"intra_query": normal(2, 2, 4), "inter_query": normal(2, 2, 4), "k_intra": 2, "k_inter": 3}
    affine = {"weight": normal(8), "bias": normal(8), "eps": 1e-5, "out_dtype": None}
    projections = {"weight": normal(24, 8), "bias": normal(24), "heads": 2}
    return {
        "select_tokens": (ops.select_tokens, {"tokens": normal(2, 2, 5, 4), **queries}),
        "gramian_volume": (ops.gramian_volume, {"anchor": normal(3, 8), "others": [normal(4, 8), normal(4, 8)]}),
        "gramian_contrastive_loss": (
            ops.gramian_contrastive_loss,
            {"features": normal(4, 3, 8), "temperature": 0.07, "label_smoothing": 0.1},
        ),
        "deformable_sample": (
            ops.deformable_sample,
            {"tokens": normal(2, 40, 6), "offsets": normal(2, 2, 3), "grid_size": (8, 5), "offset_range": 2.0},
        ),
        "quick_gelu": (ops.quick_gelu, {"x": normal(3, 5)}),
        "add_layer_norm": (ops.add_layer_norm, {"x": normal(2, 3, 8), "branch": normal(2, 3, 8), **affine}),
        "attend": (ops.attend, {"qkv": normal(3, 2, 2, 5, 4)}),
        "mean_tokens": (ops.mean_tokens, {"tokens": normal(2, 3, 6, 8)}),
        "attend_masked": (
            ops.attend_masked,
            {"queries": normal(2, 4, 8), "tokens": normal(2, 3, 6, 8), "mask": mask},
        ),
        "cross_attend": (
            ops.cross_attend,
            {"queries": normal(2, 3, 8), "tokens": normal(2, 3, 6, 8), "mask": mask, **projections},
        ),
        "convolve_windows": (ops.convolve_windows, {"x": normal(2, 9, 8, 6), "window": normal(6, 4, 4)}),
        "predict_offsets": (
            ops.predict_offsets,
            {"hidden": normal(2, 3, 40, 6), "grid_size": (8, 5), **parameters},
        ),
        "pairwise_mse_loss": (ops.pairwise_mse_loss, {"maps": normal(3, 4, 5)}),
        "sort_rows": (ops.sort_rows, {"values": normal(3, 5)}),
    }


def with_tensor_changed(x: torch.Tensor, draw: random.Random) -> object:
    """Another shape, dtype, layout, device or content of a tensor, or no tensor at all."""
    how = draw.randrange(12)
    axis = draw.randrange(x.ndim)
    if how == 0:
        return draw.choice((None, 3, 0.5, True, "x", [1.0], (), {}, b"", np.ones(tuple(x.shape), np.float32), [x]))
    if how == 1:
        others = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64)
        return x.to(draw.choice(others))
    if how == 2:
        return draw.choice((x[0], x[None], x.flatten(), x.new_zeros(()), x.unsqueeze(-1), x.movedim(axis, 0)))
    if how == 3:
        return x.narrow(axis, 0, draw.choice((0, 1, x.shape[axis] - 1)))
    if how == 4:
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)
    if how == 5:
        last = max(axis, 1) if x.ndim > 1 else 0  # so many maps would be a loop of as many turns
        huge = [2**24 if i == last else size for i, size in enumerate(x.shape)]
        return draw.choice((x.to("meta"), torch.empty(huge, device="meta")))
    if how == 6:
        return draw.choice((x.to_sparse(), x.expand(x.shape), x[:1].expand(x.shape), torch.nn.Parameter(x.float())))
    if how == 7:
        return torch.stack([x, x], -1)[..., 0]
    if how == 8:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if how == 9 and x.is_floating_point():
        return x.masked_fill(torch.rand(x.shape) < 0.3, draw.choice((float("nan"), float("inf"), -30.0, 1e-40, 0.0)))
    if how == 10 and x.is_floating_point():
        return x * draw.choice((0.0, 30.0, 1e-4, -1.0))
    return x.detach().clone().requires_grad_() if x.is_floating_point() else ~x


def with_argument(given: dict[str, object], draw: random.Random) -> dict[str, object]:
    """Arguments of which one or two are changed."""
    changed = dict(given)
    for name in draw.sample(list(given), min(len(given), draw.choice((0, 1, 1, 1, 2)))):
        value = given[name]
        if isinstance(value, torch.Tensor):
            changed[name] = with_tensor_changed(value, draw)
        elif isinstance(value, list):
            others = [with_tensor_changed(other, draw) if draw.random() < 0.7 else other for other in value]
            changed[name] = draw.choice((others, others[:1], [], others * 3))
        else:
            numbers = (*NUMBERS, 0.5, -2.0, 1e-30, float("nan"), float("inf"), -float("inf"))
            others = (None, True, "2", "", [2], torch.tensor(2), torch.tensor(0.5), torch.ones(2), (8, 5), (40, 1))
            pairs = ((8,), (8, 5, 1), (-8, -5), (8.0, 5.0), ("8", "5"), (0, 40), (2**62, 4), torch.float16, torch.int64)
            changed[name] = draw.choice((*numbers, *others, *pairs))
    return changed


def operators(_: Path) -> Try:
    """Arguments of the public operators: refused in a line that names one of them, or the reference's results."""

    def once(draw: random.Random) -> None:
        torch.manual_seed(draw.randrange(2**31))
        cases = operator_arguments()
        name = draw.choice(list(cases))
        operator, given = cases[name]
        given = with_argument(given, draw)
        results = []
        for backend in ("auto", "reference"):
            with ops.use_backend(backend), torch.set_grad_enabled(True):
                results.append(outcome_of(operator, given))
        ours, exact = results
        if isinstance(ours, str) or isinstance(exact, str):
            for line in results:
                assert isinstance(line, str), f"{name}: {results}"
                assert any(argument in line for argument in given), f"{name}: names no argument: {line}"
                assert len(line.splitlines()) == 1, line
                assert len(line) < 500, line
            return
        dtypes = {value.dtype for value in given.values() if isinstance(value, torch.Tensor)}
        for one, other in zip(ours, exact, strict=True):
            check_near(name, one, other, dtypes)

    return once


def outcome_of(operator: Callable[..., object], given: dict[str, object]) -> str | list[torch.Tensor]:
    """The results and the gradients of a call, or the line that it is refused with."""
    fresh = dict(given)
    leaves = [value for value in fresh.values() if isinstance(value, torch.Tensor) and value.requires_grad]
    if operator is ops.sort_rows and isinstance(fresh["values"], torch.Tensor) and not leaves:
        fresh["values"] = fresh["values"].clone()
    arguments = [fresh.pop(next(iter(fresh)))]
    arguments += fresh.pop("others") if isinstance(fresh.get("others"), list) else []
    try:
        results = operator(*arguments, **fresh)
    except (ValueError, TypeError) as error:
        return str(error)
    results = list(results) if isinstance(results, tuple) else [results]
    wanted = [result for result in results if result.requires_grad and not result.is_meta]
    if leaves and wanted:
        total = torch.stack([result.double().sum() for result in wanted]).sum()
        results += [x for x in torch.autograd.grad(total, leaves, allow_unused=True) if x is not None]
    return results


def check_near(name: str, ours: torch.Tensor, exact: torch.Tensor, dtypes: set[torch.dtype]) -> None:
    """Raise where a result is not the reference's, up to the rounding of its precision."""
    assert (ours.shape, ours.dtype, ours.device) == (exact.shape, exact.dtype, exact.device), f"{name}: {ours} {exact}"
    if ours.is_meta or dtypes & {torch.float16, torch.bfloat16}:  # tests/ops judges their rounding
        return
    ours, exact = ours.detach(), exact.detach()
    if name in ("attend", "cross_attend", "add_layer_norm"):  # PyTorch lets inf and NaN spread in another way
        ours = ours.where(exact.isfinite(), exact)
    if not ours.is_floating_point():
        assert torch.equal(ours, exact), f"{name}: {ours} is not {exact}"
        return
    if name == "predict_offsets" and exact.isnan().any():  # PyTorch's gradient is NaN beyond the last whole window, too
        return
    most = torch.finfo(ours.dtype).max / 4  # whose sums may or may not overflow
    one, other = (x.double().clamp(-most, most) for x in (ours, exact))
    finite = other[other.isfinite()].abs()
    scale = max(1.0, float(finite.max()) if len(finite) else 1.0)
    tolerance = (1e-2 if ours.dtype in (torch.float16, torch.bfloat16) else 1e-3) * scale
    near = torch.isclose(one, other, rtol=0, atol=tolerance, equal_nan=True)
    assert near.all(), f"{name}: {ours} is not {exact}"


KINDS: dict[str, Callable[[Path], Try]] = {
    "checkpoints": checkpoint_files,
    "states": states,
    "features": features,
    "packed": packed,
    "indexes": indexes,
    "yaml": yaml_files,
    "images": images,
    "operators": operators,
}


def refused_or(use: Callable[[], object]) -> None:
    """Let errors that a user can mend pass."""
    try:
        use()
    except (UserError, FileNotFoundError) as error:
        if len(str(error).splitlines()) != 1 or len(str(error)) > 2000:
            raise AssertionError(f"an error is one line of bounded length: {str(error)[:3000]!r}") from error


def fuzz(kind: str, seconds: float, seed: int = 0, most: int | None = None) -> int:
    """Try seeds from the given one on; the number of tries.

    Args:
        kind: one of `KINDS`.
        seconds: to go on for; at least one seed is tried.
        seed: the first.
        most: tries to end after.

    Raises:
        Exception: what a seed found, with the seed in a note of its message on the standard error.
    """
    first = seed
    with tempfile.TemporaryDirectory() as folder:
        once = KINDS[kind](Path(folder))
        end = time.monotonic() + seconds
        while seed == first or (time.monotonic() < end and (most is None or seed < first + most)):
            try:
                refused_or(partial(once, random.Random(seed)))
            except Exception:
                print(f"found by: {kind} --seed {seed} --seconds 0", file=sys.stderr)
                raise
            seed += 1
    return seed - first


def main() -> None:
    """Fuzz one kind and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        print(f"{fuzz(arguments.kind, arguments.seconds, arguments.seed)} tries, nothing found")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
