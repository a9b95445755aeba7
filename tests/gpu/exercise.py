"""Runs every kernel once in every dtype, forward and backward, for compute-sanitizer; no comparison.

python tests/gpu/exercise.py [--toy] [cuda|triton]

Without a GPU the kernels run where the backend serves tensors of the host, as the emulator does; `--toy` for that.
"""

import sys

import torch

from signal_reid import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = [(2, 3, (16, 8), 512), (3, 2, (9, 5), 40), (1, 5, (4, 4), 7)]  # batch, modalities, grid, channels
VOLUMES = [(4, 5, 512), (3, 4, 7), (300, 260, 8), (520, 520, 8)]  # rows, columns, channels; narrow and wide tiles
LOSSES = [(4, 512), (5, 7), (300, 8)]  # batch, channels: narrow tiles; off 16 bytes; wide tiles, more than one block
NORMS = [(300, 768), (5, 5120), (9, 7)]  # rows, channels


def filled(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Made on the host, so that hardly any kernel of PyTorch runs under the sanitizer."""
    return torch.randn(shape).to(dtype).to(DEVICE)


def backward(output: torch.Tensor, *leaves: torch.Tensor) -> None:
    torch.autograd.grad(output, leaves, filled(*output.shape, dtype=output.dtype))


def exercise_tokens(dtype: torch.dtype) -> None:
    for batch, modalities, grid, channels in TOKENS:
        n = grid[0] * grid[1]
        tokens = filled(batch, modalities, n + 1, channels, dtype=dtype)[:, :, 1:]
        query = filled(batch, modalities, channels, dtype=dtype)
        ops.select_tokens(tokens, query, query, n // 2, min(n, (modalities - 1) * n))
        maps = tokens.flatten(0, 1).detach().requires_grad_()
        offsets = filled(len(maps), 3, 2, dtype=dtype).requires_grad_()
        backward(ops.deformable_sample(maps, offsets, grid), maps, offsets)
        queries = filled(batch, min(8 * modalities, 24), channels, dtype=dtype).requires_grad_()
        leaf = tokens.detach().requires_grad_()
        backward(ops.attend_masked(queries, leaf, leaf.detach()[..., 0] > -1), queries, leaf)
        rows, columns = (max(n, 4) for n in grid)
        hidden = filled(modalities, batch, rows * columns + 1, channels, dtype=dtype)[:, :, 1:].requires_grad_()
        shapes = ((modalities, channels), (modalities, channels, 4, 4), *[(modalities, channels)] * 2)
        parameters = [filled(*shape).requires_grad_() for shape in shapes]
        backward(ops.predict_offsets(hidden, (rows, columns), *parameters), hidden, *parameters)
        backward(ops.pairwise_mse_loss(hidden), hidden)
        hidden = filled(batch * n * channels + 1, dtype=dtype).requires_grad_()
        backward(ops.quick_gelu(hidden), hidden)
        backward(ops.quick_gelu(hidden[1:]), hidden)


def exercise_volume(others: int) -> None:
    for rows, columns, channels in VOLUMES:
        vectors = [torch.randn(n, channels) for n in (rows, *[columns] * others)]
        vectors[0][0] = vectors[1][0]  # a pair without height
        leaves = [vector.to(DEVICE).requires_grad_() for vector in vectors]
        backward(ops.gramian_volume(*leaves), *leaves)


def exercise_loss(modalities: int) -> None:
    for batch, channels in LOSSES:
        features = torch.randn(batch, modalities, channels)
        features[0, 1] = features[0, 0]
        leaves = features.to(DEVICE).requires_grad_(), torch.tensor(0.07).to(DEVICE).requires_grad_()
        torch.autograd.grad(ops.gramian_contrastive_loss(*leaves), leaves)


def exercise_norm(dtype: torch.dtype) -> None:
    for rows, width in NORMS:
        x, weight, bias = (filled(*shape).requires_grad_() for shape in ((rows, width), (width,), (width,)))
        branch = filled(rows, width, dtype=dtype).requires_grad_()
        for added in (branch, None):
            _, normed = ops.add_layer_norm(x, added, weight, bias, out_dtype=dtype)
            backward(normed, x, weight, bias)


def main(*arguments: str) -> None:
    backend = next((argument for argument in arguments if argument != "--toy"), "cuda")
    if "--toy" in arguments:
        for sizes in (TOKENS, VOLUMES, LOSSES, NORMS):
            del sizes[2:], sizes[0]  # the second is small
    torch.manual_seed(0)
    with ops.use_backend(backend):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            exercise_tokens(dtype)
            exercise_norm(dtype)
        for others in (1, 2, 3, 4):
            exercise_volume(others)
            exercise_loss(1 + others)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"every {backend} kernel ran on {torch.cuda.get_device_name() if DEVICE == 'cuda' else 'the host'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
