"""Compiles every Triton kernel as its launch would, for GPUs that need not be there; run in a process of its own.

python tests/codegen/compile_triton.py FOLDER ARCHITECTURE [ARCHITECTURE ...]

Every operator is called on tensors of the host, on the first architecture in every dtype and variant, on the others as
the published model calls it in bf16; each launch is compiled instead of started. Cubins go to FOLDER, and kernels.json
there says what they are.
"""

import importlib
import json
import pkgutil
import re
import sys
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

import signal_reid.ops.triton

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
B, M, N, C, GRID, SAMPLED, K_INTRA, WIDTH, HIDDEN = 64, 3, 128, 512, (16, 8), (4, 2), 80, 768, 3072


class Driver:
    """As much of a GPU as compiling asks for."""

    def __init__(self):
        self.architecture = 0

    def get_current_device(self):
        return self.architecture  # kernels are cached by device

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", self.architecture, 32)


def activation(module, dtype, thorough):
    x, grad = torch.empty(2, B * M, 1 + N, HIDDEN, dtype=dtype)
    module.forward(x)
    module.backward(grad, x)


def token_selection(module, dtype, thorough):
    for channels in (C, 2 * C + 16) if thorough else (C,):  # in one block, and in several
        tokens = torch.empty(B, M, 1 + N, channels, dtype=dtype)
        query = torch.empty(B, M, channels, dtype=dtype)
        module.select_tokens(tokens[:, :, 1:], query, query, K_INTRA, 2 * K_INTRA)


def gramian(module, dtype, thorough):
    for k in (1, 2, 3, 4) if thorough else (M - 1,):
        anchor, *others = (
            torch.empty(B, C) for _ in range(1 + k)
        )  # whatever the operator is given, it computes in fp32
        module.forward(anchor, others)
        module.backward(torch.empty(B, B), anchor, others)


def gramian_loss(module, dtype, thorough):
    for modalities in (2, 3, 4, 5) if thorough else (M,):
        features, temperature = torch.empty(B, modalities, C), torch.empty(())  # in fp32, as above
        loss, slope, statistics = module.forward(features, temperature, 0.1)
        module.backward(features, loss, temperature, slope, statistics, 0.1)


def deformable_sampling(module, dtype, thorough):
    points = SAMPLED[0] * SAMPLED[1]
    tokens, offsets = torch.empty(B * M, 1 + N, C, dtype=dtype)[:, 1:], torch.empty(B * M, *SAMPLED, dtype=dtype)
    module.forward(tokens, offsets, *GRID, 2.0)
    module.backward(torch.empty(B * M, points, C, dtype=dtype), tokens, offsets, *GRID, 2.0)


def offset_head(module, dtype, thorough):
    hidden, grad = torch.empty(M, B, N, C, dtype=dtype), torch.empty(M, B, *SAMPLED, dtype=dtype)
    parameters = torch.empty(M, C), torch.empty(M, C, 4, 4), torch.empty(M, C), torch.empty(M, C)
    module.forward(hidden, *parameters, *GRID)
    module.backward(grad, hidden, *parameters, *GRID)


def pairwise_error(module, dtype, thorough):
    maps = torch.empty(M, B, SAMPLED[0] * SAMPLED[1], C, dtype=dtype)
    module.backward(maps, module.forward(maps))


def masked_attention(module, dtype, thorough):
    queries, grad = torch.empty(2, B, 8 * M, C, dtype=dtype)
    tokens, mask = torch.empty(B, M, 1 + N, C, dtype=dtype)[:, :, 1:], torch.empty(B, M, N, dtype=torch.bool)
    attended, kept = module.forward(queries, tokens, mask)
    module.backward(grad, queries, tokens, mask, attended, kept)


def residual_norm(module, dtype, thorough):
    x, branch, weight, bias = (
        torch.empty(B * M, 1 + N, WIDTH),
        torch.empty(B * M, 1 + N, WIDTH, dtype=dtype),
        *torch.empty(2, WIDTH),
    )
    total, normed = module.forward(x, branch, weight, bias, 1e-5, dtype)
    module.forward(x, None, weight, bias, 1e-5, dtype)
    module.backward(normed, total, total, weight, 1e-5, None if dtype == torch.float32 else dtype)
    module.backward(normed, None, total, weight, 1e-5, None)


OPERATORS = (
    activation,
    token_selection,
    gramian,
    gramian_loss,
    deformable_sampling,
    masked_attention,
    offset_head,
    pairwise_error,
    residual_norm,
)
CASES = {case.__name__: case for case in OPERATORS}


def modules():
    """Every module of Triton kernels by name."""
    found = {}
    for info in pkgutil.iter_modules(signal_reid.ops.triton.__path__):
        module = importlib.import_module(f"signal_reid.ops.triton.{info.name}")
        if kernels_of(module):
            found[info.name] = module
    return found


def kernels_of(module):
    jitted = (value for value in vars(module).values() if isinstance(value, triton.runtime.JITFunction))
    return sorted(kernel.__name__ for kernel in jitted if kernel.__name__.endswith("_kernel"))


@triton.jit
def _example_kernel(x_at, sum_at, n, rows: tl.constexpr, block: tl.constexpr):
    """What `reduces_what_it_loads` looks for."""
    row, column = tl.arange(0, rows), tl.arange(0, block)
    total = tl.zeros([rows], tl.float32)
    for start in range(0, n, block):
        total += tl.sum(tl.load(x_at + row[:, None] * n + start + column[None, :]), 1)
    tl.store(sum_at + row, total)


def reduces_what_it_loads(ttir):
    """Whether a loop adds up, or takes the extreme of, reductions along the last axis of tiles as they were loaded.

    Triton moves such a reduction out of the loop. Triton 3.6 cannot if the loop's result is used more than once, which
    depends on layouts that other versions choose differently. A loop can carry the tile itself instead.
    """
    reduction = r'(%\w+) = "tt\.reduce"\((%\w+)\) <\{axis = (\d+) : i32\}> \(\{.*?\}\) : \(tensor<((?:\d+x)+)'
    for reduced, tile, axis, shape in re.findall(reduction, ttir, re.DOTALL):
        if 0 < int(axis) == shape.count("x") - 1 and f"{tile} = tt.load " in ttir:
            for total in re.findall(rf"(%\w+) = \S+ (?:{reduced}, %\w+|%\w+, {reduced}) ", ttir):
                uses = re.findall(rf"^(?!.*{total} = ).*{total}\b.*$", ttir, re.MULTILINE)
                if len(uses) == 1 and "scf.yield" in uses[0]:
                    return True
    return False


def compile_all(folder, architectures):
    driver, seen, compiled, dtype = Driver(), [], [], DTYPES[0]
    triton.runtime.driver.set_active(driver)
    driver.architecture = architectures[0]
    example = _example_kernel.warmup(torch.float32, torch.float32, 64, rows=32, block=32, grid=(1,))

    def compile_instead(kernel, grid):
        def call(*arguments, **settings):
            result = kernel.warmup(*arguments, grid=grid, **settings)
            if result in seen:
                return
            seen.append(result)
            cubin = folder / f"{len(compiled)}.cubin"
            cubin.write_bytes(result.asm["cubin"])
            facts = {
                "module": kernel.fn.__module__.rpartition(".")[2],
                "name": kernel.__name__,
                "dtype": str(dtype).removeprefix("torch."),
                "settings": settings,
                "architecture": f"sm_{driver.architecture}",
                "threads": 32 * result.metadata.num_warps,
                "dynamic_shared_bytes": result.metadata.shared,
                "reduces_what_it_loads": reduces_what_it_loads(result.asm["ttir"]),
                "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg", result.asm["ptx"])),
                "instructions": len(re.findall(r";$", result.asm["ptx"], re.MULTILINE)),
                "cubin": str(cubin),
            }
            compiled.append(facts)

        return call

    triton.runtime.JITFunction.__getitem__ = compile_instead
    found = modules()
    for driver.architecture in architectures:
        thorough = driver.architecture == architectures[0]
        for dtype in DTYPES if thorough else (torch.bfloat16,):
            for name, module in found.items():
                CASES[name](module, dtype, thorough)
    kernels = {name: kernels_of(module) for name, module in found.items()}
    report = {"kernels": kernels, "compiled": compiled, "example": reduces_what_it_loads(example.asm["ttir"])}
    (folder / "kernels.json").write_text(json.dumps(report))


if __name__ == "__main__":
    compile_all(Path(sys.argv[1]), [int(architecture) for architecture in sys.argv[2:]])
