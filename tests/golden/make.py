"""Makes the golden files from a checkout of the authors' code, and says how far the stored files are from them.

python tests/golden/make.py CHECKOUT [OUTPUT]

Weights and inputs follow from the recipes of README.md, so that only what the authors' code makes of them is stored.
Without OUTPUT nothing is written. The exit code is 1 when a stored file disagrees by more than rounding.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = Path(__file__).resolve().parent
sys.path.insert(0, str(GOLDEN.parents[1] / "benchmarks"))  # the authors' code is imported as the benchmarks do

from harness.upstream import (  # noqa: E402
    CONFIGS,
    EVALUATION_MODULES,
    Upstream,
    UpstreamEvaluation,
    load_modules,
    temporary_working_directory,
)

SEEDS = {"rgbnt201": 201, "msvr310": 310}
LAYERS, IDENTITIES, CAMERAS, BATCH, ADAM_STEPS = 2, 8, 4, 8, 3
MODALITIES = ("RGB", "NI", "TI")
CONSTANTS = {"running_mean": 0.0, "running_var": 1.0, "contra_temp": 0.07}
SCHEDULED = (
    "clip_vision_encoder.base.conv1.weight",
    "clip_vision_encoder.base.ln_pre.bias",
    "clip_vision_encoder.cv_embed",
    "SIM.modal_interactive.ffn.0.weight",
    "SIM.modal_interactive.ffn.0.bias",
    "classifier_var.weight",
    "AlignM.contra_temp",
)
"""One parameter of every kind that has a learning rate of its own."""
SCHEDULE_MODULES = {"cosine": "solver.scheduler_factory", "multistep": "solver.lr_scheduler"}
RERANKINGS, RERANKING_WEIGHT = ((50, 15), (20, 6)), 0.3
RETRIEVAL_INPUTS = ("qf", "gf", "q_pid", "g_pid", "q_cam", "g_cam", "q_scene", "g_scene")
LEAST_NORM = 1e-3
"""Gradients that are smaller are rounding: the neck and the triplet loss ignore a shift of SIM's feature."""

Arrays = dict[str, np.ndarray]


def parameter_value(name: str, shape: Sequence[int], seed: int) -> np.ndarray:
    """The value of a parameter or buffer by its name in the authors' state dict."""
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    if last in CONSTANTS:
        return np.full(shape, CONSTANTS[last], np.float32)
    state = np.random.RandomState((zlib.crc32(name.encode()) ^ seed) & 0x7FFFFFFF)
    drawn = state.standard_normal(tuple(shape) or (1,)).astype(np.float32)
    if len(shape) >= 2 and "positional_embedding" not in name and "cv_embed" not in name:
        fan = shape[0] if name == "clip_vision_encoder.base.proj" else int(np.prod(shape[1:]))
        return drawn * np.float32(fan**-0.5)
    return np.float32(0.05) * drawn + np.float32(last == "weight")


@dataclass
class Inputs:
    """A batch: images of each modality (B, 3, H, W), cameras (B,), labels (B,)."""

    images: dict[str, Tensor]
    cameras: Tensor
    labels: Tensor


def make_inputs(size: Sequence[int], seed: int) -> Inputs:
    """Images, then cameras, from one generator; two images of each identity."""
    state = np.random.RandomState(seed)
    shape = (BATCH, 3, *size)
    images = {name: torch.from_numpy(state.standard_normal(shape).astype(np.float32)) for name in MODALITIES}
    cameras = torch.from_numpy(state.randint(0, CAMERAS, size=BATCH)).long()
    return Inputs(images, cameras, torch.arange(BATCH) // 2)


@dataclass
class Authors:
    """The authors' model of one configuration with the recipe's weights, and what its training needs."""

    config: Any
    model: nn.Module
    loss: Callable[[Sequence[Any], Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    inputs: Inputs

    def outputs(self) -> Sequence[Any]:
        """What the model returns in training mode: a sign, (score, feature) of each head, the losses of GAM and LAM."""
        stage = self.config.MODEL.stageName
        return self.model.train()(self.inputs.images, cam_label=self.inputs.cameras, training=True, sge=stage)

    def total(self, outputs: Sequence[Any]) -> Tensor:
        return self.loss(outputs, self.inputs.labels, self.inputs.cameras)

    @torch.no_grad()
    def feature(self) -> Tensor:
        """The retrieval feature."""
        stage = self.config.MODEL.stageName
        return self.model.eval()(self.inputs.images, cam_label=self.inputs.cameras, training=False, sge=stage)


def build(upstream: Upstream, name: str) -> Authors:
    """The model of a golden file before its first step."""
    config, seed = upstream.config(name), SEEDS[name]
    model = upstream.build_model(config, IDENTITIES, CAMERAS, LAYERS)
    values = {key: parameter_value(key, value.shape, seed) for key, value in model.state_dict().items()}
    model.load_state_dict({key: torch.from_numpy(value) for key, value in values.items()})
    loss = upstream.loss_function(config, IDENTITIES)
    optimizer = upstream.make_optimizer(config, model, IDENTITIES)
    return Authors(config, model, loss, optimizer, make_inputs(config.INPUT.SIZE_TRAIN, seed))


def model_numbers(upstream: Upstream, name: str) -> Arrays:
    """What `rgbnt201.npz` and `msvr310.npz` hold."""
    authors = build(upstream, name)
    numbers = {"eval_feature": authors.feature()}
    outputs, numbers["selected"] = outputs_and_mask(authors)
    _, *heads, gam, lam = outputs
    numbers |= {f"train_out_{index}": tensor for index, tensor in enumerate(heads)}
    numbers |= {"loss_heads": head_losses(authors, heads), "loss_gam": gam, "loss_lam": lam}
    numbers["loss_total"] = authors.total(outputs)
    numbers["loss_total"].backward()
    trained = sorted(key for key, value in authors.model.named_parameters() if value.grad is not None)
    numbers["grad_norms"] = torch.stack([authors.model.get_parameter(key).grad.norm() for key in trained])

    learning = build(upstream, name)
    numbers["adam_losses"] = adam_losses(learning)
    numbers["feature_after_adam"] = learning.feature()
    arrays = {key: value.detach().numpy() for key, value in numbers.items()}
    return arrays | {"grad_names": np.array(trained)}


def outputs_and_mask(authors: Authors) -> tuple[Sequence[Any], Tensor]:
    """The training outputs, and which tokens (B, M, N) the selection did not set to zero on the way."""
    masks: list[Tensor] = []

    def note(module: nn.Module, inputs: Any, kept: Sequence[Tensor]) -> None:
        masks.extend((tokens != 0).any(-1) for tokens in kept)

    hook = authors.model.SIM.token_selection.register_forward_hook(note)
    outputs = authors.outputs()
    hook.remove()
    return outputs, torch.stack(masks, 1)


def head_losses(authors: Authors, heads: Sequence[Tensor]) -> Tensor:
    """The loss of each head alone, from its (score, feature)."""
    zero = torch.zeros(())
    pairs = zip(heads[::2], heads[1::2], strict=True)
    return torch.stack([authors.total((None, score, feature, zero, zero)) for score, feature in pairs])


def adam_losses(authors: Authors) -> Tensor:
    """Total losses at consecutive steps on the one batch at the base rates; the model keeps what it has learnt."""
    losses = []
    for _ in range(ADAM_STEPS):
        authors.optimizer.zero_grad()
        total = authors.total(authors.outputs())
        total.backward()
        authors.optimizer.step()
        losses.append(total.detach())
    return torch.stack(losses)


def rates_by_epoch(upstream: Upstream, name: str) -> dict[str, Any]:
    """What `lr_schedule.json` holds of one configuration: rates at the start of every epoch, and weight decay."""
    config = upstream.config(name)
    model = upstream.build_model(config, IDENTITIES, CAMERAS, LAYERS)
    optimizer = upstream.make_optimizer(config, model, IDENTITIES)
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    groups = [group_of[id(model.get_parameter(parameter))] for parameter in SCHEDULED]
    decay = [group["weight_decay"] for group in groups]
    schedule = make_schedule(upstream, config, optimizer)
    rates = []
    for epoch in range(1, config.SOLVER.MAX_EPOCHS + 1):
        schedule.step(epoch)
        rates.append([float(group["lr"]) for group in groups])
    return {"parameters": list(SCHEDULED), "weight_decay": decay, "lr_by_epoch_from_1": rates}


def make_schedule(upstream: Upstream, config: Any, optimizer: torch.optim.Optimizer) -> Any:
    """The schedule that the authors' training takes: multi-step on MSVR310, else cosine."""
    modules, solver = load_modules(upstream.path, SCHEDULE_MODULES), config.SOLVER
    if config.DATASETS.NAMES != "MSVR310":
        return modules["cosine"].create_scheduler(config, optimizer)
    warm_up = solver.WARMUP_FACTOR, solver.WARMUP_ITERS, solver.WARMUP_METHOD
    return modules["multistep"].WarmupMultiStepLR(optimizer, solver.STEPS, solver.GAMMA, *warm_up)


def retrieval_numbers(checkout: Path, inputs: Mapping[str, np.ndarray]) -> Arrays:
    """What `retrieval.npz` holds; features, identities, cameras and scenes are those of the stored file."""
    evaluation = UpstreamEvaluation(checkout)
    metrics = load_modules(checkout, EVALUATION_MODULES)["metrics"]
    features = [torch.from_numpy(inputs[key]) for key in ("qf", "gf")]
    sides = [[inputs[f"{side}_{key}"] for key in ("pid", "cam", "scene")] for side in "qg"]
    batches = [(x, *attributes, [""] * len(x)) for x, attributes in zip(features, sides, strict=True)]
    found = {
        "camera": evaluation.camera(batches, len(features[0]), reranking=False),
        "scene": evaluation.scene(batches, len(features[0])),
    }
    pairs = [array for attribute in (0, 1) for array in (side[attribute] for side in sides)]
    for k1, k2 in RERANKINGS:
        distances = metrics.re_ranking(*features, k1=k1, k2=k2, lambda_value=RERANKING_WEIGHT)
        cmc, mean_precision = metrics.eval_func(distances, *pairs)[:2]
        found[f"rerank_k{k1}_{k2}"] = float(mean_precision), cmc
    numbers = {key: inputs[key] for key in RETRIEVAL_INPUTS}
    for key, (mean_precision, cmc) in found.items():
        numbers |= {f"{key}_cmc": np.asarray(cmc, np.float32), f"{key}_mAP": np.float64(mean_precision)}
    return numbers


def make_all(checkout: Path) -> dict[str, Arrays | dict[str, Any]]:
    """The content of every golden file by its name."""
    upstream = Upstream(checkout)
    with np.load(GOLDEN / "retrieval.npz") as stored:
        inputs = {key: stored[key] for key in RETRIEVAL_INPUTS}
    with temporary_working_directory(), redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch, about calls that the authors make
        made: dict[str, Any] = {f"{name}.npz": model_numbers(upstream, name) for name in SEEDS}
        made["lr_schedule.json"] = {data_set: rates_by_epoch(upstream, name) for name, data_set in CONFIGS.items()}
        made["retrieval.npz"] = retrieval_numbers(checkout, inputs)
    return made


def largest_difference(made: Any, stored: Any, least: float | None = None) -> float:
    """Largest difference of two arrays over the largest magnitude stored.

    Args:
        least: where given, every entry's difference is taken over its own magnitude, or over this where that is less.

    Returns:
        Infinity for other shapes, and for names, identities or masks that are not the same.
    """
    made, stored = np.asarray(made), np.asarray(stored)
    if made.shape != stored.shape or made.dtype.kind != stored.dtype.kind:
        return float("inf")
    if stored.dtype.kind not in "fc":
        return 0.0 if np.array_equal(made, stored) else float("inf")
    difference, size = np.abs(made.astype(np.float64) - stored), np.abs(stored)
    scale = size.max(initial=1e-30) if least is None else np.maximum(size, least)
    return float((difference / scale).max(initial=0.0))


def tolerance_of(key: str) -> float:
    """Relative agreement in fp32 on any machine: gradients and what follows from them have fewer digits."""
    return 1e-3 if key.startswith(("grad_", "adam_", "feature_after_adam")) else 1e-4


def compare(made: Mapping[str, Any], stored: Mapping[str, Any]) -> dict[str, float]:
    """`largest_difference` of every entry of a file; an entry that only one of both has is infinitely off."""
    keys = dict.fromkeys((*made, *stored))
    both = made.keys() & stored.keys()

    def difference(key: str) -> float:
        if key not in both:
            return float("inf")
        return largest_difference(made[key], stored[key], LEAST_NORM if key == "grad_norms" else None)

    return {key: difference(key) for key in keys}


def read(path: Path) -> dict[str, Any]:
    """A golden file's entries; those of JSON as `DATA SET entry`."""
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()))
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def flat(schedules: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    return {f"{data_set} {key}": value for data_set, entries in schedules.items() for key, value in entries.items()}


def write(path: Path, content: Any) -> None:
    """Write a golden file; it appears whole or not at all."""
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        if path.suffix == ".json":
            file.write(json.dumps(content).encode())
        else:
            np.savez_compressed(file, **content)
    beside.replace(path)


def report(made: Mapping[str, Any]) -> bool:
    """Print how far every entry of the stored files is from what was made; whether all of them agree."""
    agree = True
    for name, content in made.items():
        differences = compare(flat(content) if name.endswith(".json") else content, read(GOLDEN / name))
        for key, difference in differences.items():
            verdict = "agrees" if difference <= tolerance_of(key) else "DIFFERS"
            agree &= verdict == "agrees"
            print(f"{name} {key}: {verdict}, {difference:.1e}")
    return agree


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, metavar="CHECKOUT", help="a checkout of the authors' code")
    parser.add_argument("output", type=Path, nargs="?", metavar="OUTPUT", help="write the files into this directory")
    args = parser.parse_args(arguments)
    if not (args.checkout / "modeling").is_dir():
        print(f"error: CHECKOUT must name a checkout of the authors' code, got {args.checkout}", file=sys.stderr)
        return 2
    try:
        made = make_all(args.checkout.resolve())
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            for name, content in made.items():
                write(args.output / name, content)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if report(made) else 1


if __name__ == "__main__":
    sys.exit(main())
