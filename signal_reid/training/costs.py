"""What a model costs, module by module: parameters, floating-point operations, memory and time.

Each module is measured alone, on the inputs that it had in a pass of the whole model: its operations by PyTorch's
counter with our operators' formulas (`ops/flops.py`), its time by a clock that waits for the device. The memory that
a training step keeps is measured in the pass of the whole model, where a tensor that several modules keep counts once.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from signal_reid.config import Config
from signal_reid.data.progress import ProgressCallback
from signal_reid.methods.base import Method
from signal_reid.methods.registry import build_model
from signal_reid.ops.flops import flop_counter
from signal_reid.runtime.device import Precision, choose_precision
from signal_reid.runtime.errors import InputError
from signal_reid.training.live_memory import KeptBytes, LiveBytes
from signal_reid.training.module_calls import recording, replay
from signal_reid.training.step import total_loss


@dataclass(frozen=True)
class InferenceCost:
    """A pass in evaluation mode, of a whole batch."""

    flops: int
    peak_bytes: int
    """Most bytes of tensors alive between two operators, without parameters and images."""
    seconds: float | None
    """Median of the repeats; none where nothing was timed."""


@dataclass(frozen=True)
class TrainingCost:
    """A forward in training mode and its backward, of a whole batch."""

    forward_flops: int
    backward_flops: int
    kept_bytes: int
    """Bytes of the tensors that the forward keeps for the backward and no module before it kept."""
    forward_seconds: float | None
    backward_seconds: float | None


@dataclass(frozen=True)
class ModuleCost:
    """One module of the model, or all of it; a pass that never runs it is none."""

    name: str
    parameters: int
    trainable: int
    """Parameters that a gradient reaches by setting; the rest are frozen."""
    inference: InferenceCost | None
    training: TrainingCost | None


@dataclass(frozen=True)
class ModelCosts:
    """What a method costs with a configuration."""

    method: str
    """The method's title."""
    batch: int
    device: str
    precision: str
    """Precision of the training step's matrix products."""
    evaluation_precision: str
    modules: tuple[ModuleCost, ...]
    """The backbone first, then the method's other modules in their order."""
    whole: ModuleCost
    said_flops: float
    """What the method itself says of one sample's forward in training, by which MFU is reckoned."""
    notes: tuple[str, ...]
    """What the method says about how its operations are counted."""

    @property
    def counted_flops(self) -> float:
        """One sample's forward in training by PyTorch's counter, to compare with what the method says."""
        assert self.whole.training is not None
        return self.whole.training.forward_flops / self.batch


def measure_costs(
    config: Config,
    device: torch.device,
    batch: int,
    num_identities: int,
    num_cameras: int,
    repeats: int = 3,
    progress: ProgressCallback | None = None,
) -> ModelCosts:
    """Build a model with random weights and measure it on random images.

    Args:
        config: `model`, `data.image_size`, the losses and the precisions are used, and gradient checkpointing; a batch
            is neither accumulated nor compiled.
        device: where to measure.
        batch: samples of a batch, at least 2.
        num_identities: classes of the heads, at least 2.
        num_cameras: rows of the camera embedding.
        repeats: how often each pass is timed, after one that warms up; 0 leaves the times out.
        progress: called with the passes done and their number.

    Raises:
        ValueError: a number outside of these.
    """
    for name, value, least in (("batch", batch, 2), ("repeats", repeats, 0), ("cameras", num_cameras, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if num_identities < 2:
        raise InputError(f"identities must be at least 2, got {num_identities}")
    torch.manual_seed(config.training.seed)
    model = build_model(config, num_identities, num_cameras).to(device)
    model.backbone.checkpointing = config.training.gradient_checkpointing
    images = torch.randn(batch, config.model.modalities, 3, *config.data.image_size, device=device)
    cameras = torch.arange(batch, device=device) % num_cameras
    labels = torch.arange(batch, device=device) % min(num_identities, max(2, batch // 2))
    training = choose_precision(config.training.precision, device)
    meter = _Meter(device, repeats, progress, 2 * (1 + len(list(model.children()))))

    def step() -> Tensor:
        encoded = model.encode(images, cameras)
        return total_loss(model.losses(encoded, labels), config)

    evaluated = _measure_inference(model, images, cameras, Precision(config.evaluation.precision, device), meter)
    trained = _measure_training(model, step, (images, cameras, labels), training, meter)
    names = dict.fromkeys(["backbone", *(name for name, _ in model.named_children())])
    modules = tuple(_cost(name, getattr(model, name), evaluated.get(name), trained.get(name)) for name in names)
    return ModelCosts(
        method=model.title,
        batch=batch,
        device=str(device),
        precision=training.name,
        evaluation_precision=config.evaluation.precision,
        modules=modules,
        whole=_cost("whole model", model, evaluated[""], trained[""]),
        said_flops=model.flops(),
        notes=tuple(model.cost_notes()),
    )


def _cost(name: str, module: nn.Module, inference: InferenceCost | None, training: TrainingCost | None) -> ModuleCost:
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return ModuleCost(name, sum(p.numel() for p in parameters), trainable, inference, training)


@dataclass
class _Meter:
    """Times passes, and counts them for whoever watches."""

    device: torch.device
    repeats: int
    progress: ProgressCallback | None
    total: int
    done: int = 0

    def seconds(self, *stages: Callable[[], Any]) -> list[float | None]:
        """The median time of each of some stages that follow one another."""
        laps: list[list[float]] = [[] for _ in stages]
        for _ in range(self.repeats):
            for lap, stage in zip(laps, stages, strict=True):
                self._wait()
                start = time.perf_counter()
                stage()
                self._wait()
                lap.append(time.perf_counter() - start)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)
        return [statistics.median(lap) if lap else None for lap in laps]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _measure_inference(
    model: Method, images: Tensor, cameras: Tensor, precision: Precision, meter: _Meter
) -> dict[str, InferenceCost]:
    """The whole model, under the name of nothing, and each module that evaluation runs."""

    def measure(run: Callable[[], Any]) -> InferenceCost:
        with torch.inference_mode(), precision.autocast(), flop_counter() as counter, LiveBytes(model) as live:
            run()
        with torch.inference_mode():

            def timed() -> None:
                with precision.autocast():
                    run()

            (seconds,) = meter.seconds(timed)
        return InferenceCost(counter.get_total_flops(), live.peak, seconds)

    model.eval()
    with torch.inference_mode(), precision.autocast(), recording(model) as calls:
        model(images, cameras)
    costs = {"": measure(lambda: model(images, cameras))}
    for name, of_module in calls.items():
        costs[name] = measure(lambda of_module=of_module: [m(*a, **k) for m, a, k in of_module])  # type: ignore[misc]
    return costs


def _measure_training(
    model: Method, step: Callable[[], Tensor], inputs: Sequence[Tensor], precision: Precision, meter: _Meter
) -> dict[str, TrainingCost]:
    """The whole model, under the name of nothing, and each module that training runs."""
    model.train()
    with precision.autocast(), recording(model) as calls, KeptBytes(model, inputs) as kept:
        total = step()
    del total
    costs = {"": _training_cost(model, lambda: [step()], sum(kept.by_module.values()), precision, meter)}
    for name, of_module in calls.items():
        run = replay(of_module)
        costs[name] = _training_cost(model, run, kept.by_module[name], precision, meter)
    return costs


def _training_cost(
    model: Method, run: Callable[[], list[Tensor]], kept_bytes: int, precision: Precision, meter: _Meter
) -> TrainingCost:
    outputs: list[Tensor] = []

    def forward() -> None:
        model.zero_grad(set_to_none=True)
        with precision.autocast():
            outputs[:] = run()

    def backward() -> None:
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
        outputs.clear()

    with flop_counter() as before:
        forward()
    with flop_counter() as after:
        backward()
    seconds = meter.seconds(forward, backward)
    return TrainingCost(before.get_total_flops(), after.get_total_flops(), kept_bytes, *seconds)
