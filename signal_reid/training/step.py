"""Forward and backward of one training step: eager or compiled, of the whole batch at once or in parts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from signal_reid.config import Config
from signal_reid.methods.base import Encoded, Method
from signal_reid.ops import dispatch
from signal_reid.runtime.device import Precision
from signal_reid.runtime.distributed import ALONE, Processes, others_at_hand
from signal_reid.runtime.errors import InputError
from signal_reid.training.sharing import SharedStep, check_shareable


class TrainingStep:
    """Computes the losses of a batch and their gradients.

    With `training.accumulation` above 1 the backbone, which holds nearly all activations, sees the batch in that many
    parts, first without keeping anything, then again with the gradient of the tokens at hand. Everything after it sees
    the whole batch: batch statistics, the hardest triplets and the volumes are those of an undivided step.

    Args:
        model: in training mode when called.
        config: `training` and `losses` are used.
        precision: of the matrix products; its scaler multiplies the loss.
        scaler: see `Precision.scaler`.
        compiler: the backend of `torch.compile`.
        say: told after the first step what compiling cost, or why nothing is compiled.
        processes: that share the step, each with its part of the batch (`training/sharing.py`).

    Where `training.compile` is `auto` and compiling fails, the step goes on without, and `compile_error` says why.

    Raises:
        ValueError: the settings do not fit together; from a step, when compiling fails that was asked for, or fails in
            the backward.

    Source: the two passes over the backbone are Gao et al., Scaling Deep Contrastive Learning Batch Size (2021).
    """

    def __init__(
        self,
        model: Method,
        config: Config,
        precision: Precision,
        scaler: torch.amp.GradScaler,
        compiler: str = "inductor",
        say: Callable[[str], None] = lambda text: None,
        processes: Processes = ALONE,
    ):
        settings = config.training
        self.config, self.model, self.precision, self.scaler = config, model, precision, scaler
        self.parts = settings.accumulation
        self.compiled = wants_compile(config, precision.device)
        self.first_seconds: float | None = None
        """Wall time of the first step, most of which is compilation where there is any."""
        self.compile_error: str | None = None
        """Why the step is not compiled though `training.compile=auto` would have it so: the error's first line."""
        self._say = say
        self._graphs = settings.cuda_graphs
        self._pieces: list[tuple[Tensor, Tensor]] = []
        self._leaves: list[Tensor] = []
        self._started = 0.0
        mode = "reduce-overhead" if self._graphs else None
        uncached = _no_cached_graphs() if self.compiled else nullcontext()
        unsplit = _one_graph() if self.compiled and processes.size > 1 else nullcontext()

        def prepared(function: Callable[..., Any]) -> Callable[..., Any]:
            if not self.compiled:
                return function
            compiled = torch.compile(function, fullgraph=True, dynamic=False, backend=compiler, mode=mode)

            def call(*arguments: Tensor) -> Any:
                if self.compiled:
                    try:
                        with uncached, unsplit:
                            return compiled(*arguments)
                    except Exception as error:
                        self._do_without_compiling(error)
                return function(*arguments)

            return call

        self._whole = prepared(self._forward_whole)
        self._encode, self._after_backbone = prepared(self._forward_backbone), prepared(self._forward_after)
        self._shared: SharedStep | None = None
        if processes.size > 1:
            check_shareable(config, processes)
            self._after_own = prepared(self._forward_own)
            of_images, of_batch = prepared(self._forward_per_sample), prepared(self._forward_batch)
            self._shared = SharedStep(model, config, processes, of_images, lambda rows, labels: of_batch(labels, *rows))

    def forward(self, images: Tensor, cameras: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of a batch as the method names them, after their weighted `total`; call `backward` next.

        Args:
            images: (B, M, 3, H, W) floating, normalised.
            cameras: (B,) int64.
            labels: (B,) int64.
        """
        self._started = time.perf_counter()
        with self._quietly():
            return self._forward(images, cameras, labels)

    def _forward(self, images: Tensor, cameras: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.compiled and self._graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.parts == 1:
            shared = self._shared
            return self._whole(images, cameras, labels) if shared is None else shared.forward(images, cameras, labels)
        self._pieces = list(zip(images.chunk(self.parts), cameras.chunk(self.parts), strict=True))
        with torch.no_grad():
            encoded = [self._encode(*piece) for piece in self._pieces]
        self._leaves = [torch.cat(outputs).requires_grad_() for outputs in zip(*encoded, strict=True)]
        if self._shared is None:
            return self._after_backbone(*self._leaves, labels)
        return self._shared.after(self._after_own(*self._leaves), labels)

    def backward(self, total: Tensor) -> None:
        """Add the gradient of the total loss, scaled in fp16, to that of the parameters."""
        try:
            with self._quietly():
                self._backward(total)
        except Exception as error:
            if self.compiled and _from_compiler(error):
                raise _compile_failed(error) from error
            raise
        if self.first_seconds is None:
            self.first_seconds = time.perf_counter() - self._started
            self._report_compilation()

    def _quietly(self) -> AbstractContextManager[Any]:
        """Around the step in which all is compiled."""
        return _no_warnings_of_the_compiler() if self.compiled and self.first_seconds is None else nullcontext()

    def agree(self) -> None:
        """Make the model the same in all processes, buffers and all; each calls this before the model is evaluated."""
        if self._shared is not None:
            self._shared.agree()

    def _backward(self, total: Tensor) -> None:
        if self.parts == 1:
            self._differentiate([self.scaler.scale(total)])
            return
        with self._keeping_gradients():
            self._differentiate([self.scaler.scale(total)])
        chunks = [leaf.grad.chunk(self.parts) if leaf.grad is not None else None for leaf in self._leaves]
        for index, piece in enumerate(self._pieces):
            gradients = [None if chunk is None else chunk[index] for chunk in chunks]
            if self._shared is not None and index == self.parts - 1:
                self._differentiate(self._shared.exchanging(self._encode, *piece), gradients)
                continue
            with self._keeping_gradients():
                self._differentiate(self._encode(*piece), gradients)
        self._pieces, self._leaves = [], []

    def _keeping_gradients(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._shared is None else self._shared.collecting()

    def _differentiate(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor | None] = (None,)) -> None:
        """Backward from those outputs that have a gradient, or from the one loss."""
        if len(outputs) > 1:
            reached = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
            outputs, gradients = [output for output, _ in reached], [gradient for _, gradient in reached]
        with others_at_hand(mixed=True) if self._shared is not None else nullcontext():
            torch.autograd.backward(outputs, gradients)

    def _report_compilation(self) -> None:
        if self.compiled:
            self._say(
                f"the first step took {self.first_seconds:.0f} s, most of it compilation; --no-compile does without"
            )
        elif self.compile_error is not None:
            self._say(f"torch.compile failed, the run goes on without it: {self.compile_error}")

    def _do_without_compiling(self, error: Exception) -> None:
        """Note why; an error that is not the compiler's, or where compiling was asked for, is raised."""
        if not _from_compiler(error):
            raise error
        if self.config.training.compile != "auto" or self._graphs:
            raise _compile_failed(error) from error
        self.compiled, self.compile_error = False, _first_line(error)

    def _forward_whole(self, images: Tensor, cameras: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return self._forward_after(*self._forward_backbone(images, cameras), labels)

    def _forward_backbone(self, images: Tensor, cameras: Tensor) -> Encoded:
        with self.precision.autocast():
            return self.model.encode(images, cameras)

    def _forward_per_sample(self, images: Tensor, cameras: Tensor) -> tuple[Tensor, ...]:
        return self._forward_own(*self._forward_backbone(images, cameras))

    def _forward_own(self, tokens: Tensor, cls: Tensor) -> tuple[Tensor, ...]:
        with self.precision.autocast():
            return self.model.per_sample(Encoded(tokens, cls))

    def _forward_batch(self, labels: Tensor, *samples: Tensor) -> dict[str, Tensor]:
        with self.precision.autocast():
            losses = self.model.batch_losses(samples, labels)
        return {"total": total_loss(losses, self.config), **losses}

    def _forward_after(self, tokens: Tensor, cls: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with self.precision.autocast():
            losses = self.model.losses(Encoded(tokens, cls), labels)
        return {"total": total_loss(losses, self.config), **losses}


def total_loss(losses: Mapping[str, Tensor], config: Config) -> Tensor:
    """What training minimises: the losses of a method, each times its weight in the section `losses`.

    What has a dot in its name only tells of a loss, see `Method.losses`.

    Args:
        losses: () tensors by name, as `Method.losses` gives them.
        config: of the method.

    Returns:
        () tensor.
    """
    first, *others = (config.losses.weight(name) * loss for name, loss in losses.items() if "." not in name)
    return sum(others, start=first)


def _one_graph() -> AbstractContextManager[Any]:
    """Keep torch.compile from splitting a graph where DistributedDataParallel's buckets of gradients end.

    Where a bucket ends within `torch.no_grad`, such as SIM's selection, all before it gets no gradient, without a word
    (torch 2.13); torch 2.4 refuses to split what holds gradient checkpointing or an autograd function. The price: the
    gradients travel after the compiled backward instead of beside it.
    """
    import torch._dynamo  # takes a second

    context: AbstractContextManager[Any] = torch._dynamo.config.patch(optimize_ddp=False)
    return context


@contextmanager
def _no_warnings_of_the_compiler() -> Iterator[None]:
    """Inductor warns of its own use of what is deprecated, and that products in fp32 are not rounded to TF32."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
        yield


def _no_cached_graphs() -> AbstractContextManager[Any]:
    """Keep torch.compile from writing the graphs of forward and backward to its cache on the disk.

    Pickling them in the first backward ends some processes by a segmentation fault: one of the tests ended so on an
    H100 with torch 2.11; https://github.com/pytorch/pytorch/issues/177442 tells of 10 to 30 % of first runs with 2.10.
    The kernels are cached on their own, so a later start takes a few seconds longer at most. The environment variable
    TORCHINDUCTOR_AUTOGRAD_CACHE=1 has the graphs cached nevertheless.
    """
    import torch._functorch.config as config  # takes a second

    known = hasattr(config, "enable_autograd_cache")  # not to torch 2.4
    context: AbstractContextManager[Any] = config.patch(enable_autograd_cache=False) if known else nullcontext()
    return context


def _from_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    return isinstance(error, TorchDynamoException)


def _compile_failed(error: Exception) -> ValueError:
    return InputError(f"torch.compile failed, --no-compile does without it: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    """The first line of what went wrong inside, where that is wrapped."""
    error = getattr(error, "inner_exception", None) or error
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def wants_compile(config: Config, device: torch.device) -> bool:
    """Whether a step is compiled: where asked for; with `auto` on a GPU that Triton serves.

    Raises:
        ValueError: CUDA graphs are asked for where nothing is compiled, or no GPU is.
    """
    choice = config.training.compile
    compiled = choice if isinstance(choice, bool) else device.type == "cuda" and _triton_serves(device)
    if config.training.cuda_graphs and not (compiled and device.type == "cuda"):
        raise InputError(
            f"training.cuda_graphs needs a GPU and training.compile, got {device} and training.compile={choice}"
        )
    return compiled


def _triton_serves(device: torch.device) -> bool:
    if dispatch.unavailable_reason("triton") is not None or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    from torch._dynamo.eval_frame import is_dynamo_supported  # takes a second to import

    return is_dynamo_supported()
