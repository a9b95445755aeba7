"""A training step that several processes share: each runs the backbone on its part of the batch.

With `training.gather=global` every process then computes the same losses of the whole batch, from what
`Method.per_sample` gave of all samples. DistributedDataParallel takes the mean of all gradients over the processes.
What stands before the gathering has in each process the gradient of that process's samples alone, so its mean would be
the whole batch's gradient divided by the number of processes: the gathering multiplies by that number on the way back.
What stands behind it has the same gradient everywhere, and so has the mean. No gradient travels back through the
gathering.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from signal_reid.config import Config
from signal_reid.methods.base import Method
from signal_reid.runtime.distributed import Processes, others_at_hand
from signal_reid.runtime.errors import InputError


def check_shareable(config: Config, processes: Processes) -> None:
    """Refuse settings that several processes cannot train with.

    Raises:
        InputError: the message names the setting.
    """
    if processes.size == 1:
        return
    size, batch, instances = processes.size, config.data.batch_size, config.data.instances
    if config.training.cuda_graphs:
        raise InputError(f"training.cuda_graphs cannot go with {size} processes: gradients travel between the kernels")
    if batch % size:
        raise InputError(f"data.batch_size must be a multiple of the {size} processes, got {batch}")
    if (batch // size) % config.training.accumulation:
        raise InputError(
            f"training.accumulation must divide the {batch // size} samples that each of {size} processes gets of "
            f"data.batch_size={batch}, got {config.training.accumulation}"
        )
    if config.training.gather == "local" and ((batch // size) % instances or batch // size < 2 * instances):
        raise InputError(
            f"training.gather=local needs at least 2 whole identities of data.instances={instances} images in each "
            f"process, got {batch // size} samples of data.batch_size={batch}"
        )


class SharedStep:
    """Forward and backward of this process's part of a batch, with gradients that all processes agree on.

    Args:
        model: in training mode when called; every process has the same weights.
        config: `training` is used.
        processes: more than one.
        per_sample: images (b, ...), cameras (b,) -> `Method.per_sample` of them.
        losses: what all samples gave, labels (B,) -> losses by name, with the weighted `total`.
    """

    def __init__(
        self,
        model: Method,
        config: Config,
        processes: Processes,
        per_sample: Callable[..., tuple[Tensor, ...]],
        losses: Callable[..., dict[str, Tensor]],
    ):
        self._processes, self._whole = processes, config.training.gather == "global"
        self._model, self._per_sample, self._losses = model, per_sample, losses
        first = next(model.parameters())
        with others_at_hand(mixed=True):  # it compares the shapes of all processes' parameters
            self._parallel = DistributedDataParallel(
                _Called(model),
                device_ids=[first.device.index] if first.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                # With accumulation the pass that exchanges gradients runs the backbone alone.
                find_unused_parameters=config.training.accumulation > 1,
            )

    def forward(self, images: Tensor, cameras: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The losses of the whole batch from this process's samples; the backward from `total` exchanges gradients."""
        losses: dict[str, Tensor] = self.exchanging(lambda: self.after(self._per_sample(images, cameras), labels))
        return losses

    def after(self, samples: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """The losses from what `Method.per_sample` gave of this process's samples."""
        if self._whole:
            *everything, of_all = gather_samples((*samples, labels), self._processes.size)
            return self._losses(tuple(everything), of_all)
        return _with_common_values(self._losses(tuple(samples), labels), self._processes.size)

    def exchanging(self, function: Callable[..., Any], *arguments: Tensor) -> Any:
        """Run a function of the model; the backward from what it gives exchanges all gradients collected so far."""
        with others_at_hand(mixed=True):  # it also hands on process 0's buffers
            return self._parallel(lambda: function(*arguments))

    def agree(self) -> None:
        """Hand on process 0's buffers, such as running statistics, where each process computed its own.

        Raises:
            LostProcessError: a process ended.
        """
        if not self._whole:
            for buffer in self._model.buffers():
                with others_at_hand():
                    dist.broadcast(buffer, src=0)

    def collecting(self) -> AbstractContextManager[Any]:
        """Backwards inside add to the gradients of this process; see `exchanging`."""
        manager: AbstractContextManager[Any] = self._parallel.no_sync()
        return manager


class _Called(nn.Module):
    """Runs a function where DistributedDataParallel would run the model that it watches."""

    def __init__(self, model: Method):
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def gather_samples(samples: Sequence[Tensor], size: int) -> tuple[Tensor, ...]:
    """The rows of all processes in the order of ranks, in one exchange of bytes.

    Args:
        samples: (b, ...) of any dtypes, alike in every process.
        size: number of processes.

    Returns:
        As many tensors (size * b, ...). Their gradients reach this process's rows alone, multiplied by `size`; see the
        module's text.

    Raises:
        LostProcessError: a process ended.
    """
    gathered: tuple[Tensor, ...] = _Gather.apply(size, *samples)
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, size: int, *samples: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.size, ctx.rows = size, len(samples[0])
        ctx.start = dist.get_rank() * ctx.rows
        rows = [sample.contiguous().view(ctx.rows, -1).view(torch.uint8) for sample in samples]
        packed = torch.cat(rows, dim=1)
        everything = packed.new_empty(size * ctx.rows, packed.shape[1])
        with others_at_hand():
            dist.all_gather(list(everything.chunk(size)), packed)
        parts = everything.split([row.shape[1] for row in rows], dim=1)
        result = tuple(
            part.contiguous().view(sample.dtype).view(-1, *sample.shape[1:])
            for part, sample in zip(parts, samples, strict=True)
        )
        ctx.mark_non_differentiable(*(tensor for tensor in result if not tensor.is_floating_point()))
        return result

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        own = slice(ctx.start, ctx.start + ctx.rows)
        return None, *(None if gradient is None else gradient[own] * ctx.size for gradient in gradients)


def _with_common_values(losses: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The same losses with the values that are their means over the processes, and gradients of this process's."""
    means = torch.stack([loss.detach() for loss in losses.values()])
    with others_at_hand():
        dist.all_reduce(means)
    return {
        name: loss + (mean / size - loss.detach()) for (name, loss), mean in zip(losses.items(), means, strict=True)
    }
