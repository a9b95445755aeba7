"""Runs every CUDA kernel once in every dtype, forward and backward, for compute-sanitizer; no comparison.

python tests/gpu/exercise.py
"""

import torch

from signal_reid import ops

SHAPES = [(2, 3, (16, 8), 512), (3, 2, (9, 5), 40), (1, 5, (4, 4), 7)]


def main() -> None:
    torch.manual_seed(0)
    calls = 0
    with ops.use_backend("cuda"):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for batch, modalities, grid, channels in SHAPES:
                n = grid[0] * grid[1]
                # Filled on the host: kernels of PyTorch are none of the sanitizer's business here.
                tokens = torch.randn(batch, modalities, n + 1, channels).to("cuda", dtype)[:, :, 1:]
                query = torch.randn(batch, modalities, channels).to("cuda", dtype)
                ops.select_tokens(tokens, query, query, n // 2, min(n, (modalities - 1) * n))
                maps = tokens.flatten(0, 1).detach().requires_grad_()
                offsets = torch.randn(len(maps), 3, 2).to("cuda", dtype).requires_grad_()
                ops.deformable_sample(maps, offsets, grid).sum().backward()
                calls += 2
        for others in (1, 2, 3, 4):
            for rows, columns, channels in ((4, 5, 512), (70, 66, 12), (3, 4, 7), (300, 260, 8)):
                vectors = [torch.randn(r, channels).cuda() for r in (rows, *[columns] * others)]
                vectors[0][0] = vectors[1][0]  # a pair without height
                ops.gramian_volume(*(v.requires_grad_() for v in map(torch.Tensor.detach, vectors))).sum().backward()
                calls += 1
    torch.cuda.synchronize()
    print(f"ran {calls} calls forward and backward on {torch.cuda.get_device_name()}")


if __name__ == "__main__":
    main()
