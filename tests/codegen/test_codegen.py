"""What nvcc makes of the kernels for all that setup.py builds for: no spills, blocks that fit, accesses of 16 bytes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Expected:
    """What holds for every instantiation of a kernel.

    Attributes:
        width_at: place of the template argument that says how many elements one access moves; None where there is none,
            as lanes next to each other read single numbers of what lies in the cache.
        registers: most that let the blocks of its launch bounds fit on a multiprocessor of 65,536.
        wide_loads: fewest 16-byte loads in a vectorised instantiation, one per row that it streams.
        narrow_loads: most other loads from global memory there; None where the pairs' coefficients or queries are such.
        wide_stores, narrow_stores: likewise.
    """

    width_at: int | None
    registers: int
    wide_loads: int
    narrow_loads: int | None
    wide_stores: int
    narrow_stores: int | None


EXPECTED = {
    # One block of up to 640 threads; four inputs and two results, each at most two accesses in any of three dtypes.
    "add_layer_norm_kernel": Expected(0, 96, 16, 0, 8, 0),
    # Likewise; the shares of two gradients are fp32.
    "add_layer_norm_backward_kernel": Expected(0, 96, 10, 0, 12, 0),
    # All threads that fit run at once; x and its gradient, and one by one what is left at the end.
    "quick_gelu_kernel": Expected(1, 32, 1, None, 1, None),
    "quick_gelu_backward_kernel": Expected(1, 32, 2, None, 1, None),
    # Two blocks of 256 threads; four tokens, two steps of each in flight, and three vectors of the queries.
    "select_tokens_kernel": Expected(1, 128, 11, 0, 0, None),
    "select_from_scores_kernel": Expected(None, 255, 0, None, 0, None),
    # Two blocks of 256 threads; a lane takes two channels at most, its tokens by the pair.
    "offset_head_kernel": Expected(None, 128, 0, None, 0, None),
    # Three blocks of 128 threads, a channel each.
    "offset_head_backward_kernel": Expected(None, 168, 0, None, 0, None),
    "offset_head_parameters_kernel": Expected(None, 64, 0, None, 0, None),
    # All threads that fit run at once; the first map and another, a share of the loss per block.
    "pairwise_error_kernel": Expected(1, 64, 2, 0, 0, None),
    # The first map and another, then each again; the gradient of the loss is narrow.
    "pairwise_error_backward_kernel": Expected(1, 64, 3, None, 1, 0),
    # Four tokens around a point; its offset is the narrow load.
    "sample_kernel": Expected(1, 128, 4, 1, 1, 0),
    # The gradient and four tokens, the gradient again; an offset for each half, one gradient of an offset.
    "sample_backward_kernel": Expected(1, 128, 6, 2, 1, 1),
    # Two blocks of 256 threads; four anchor rows and a column's vectors. Narrow are the gradient of a pair, or what the
    # loss makes it from: its own gradient, temperature, slope, two statistics of the row and two of the column.
    "pairs_kernel": Expected(2, 128, 5, 9, 1, None),
    # One block of 256 threads, in fp32. Queries; of the first tile and the next, two tokens of four accesses each.
    # The mask is the narrow load; logits are narrow stores.
    "attend_masked_kernel": Expected(1, 255, 9, 1, 4, None),
    # Likewise with the gradient in place of the queries, which are read two channels at a time; zeros are wide.
    "attend_masked_backward_kernel": Expected(1, 255, 9, None, 1, None),
    # Fp16 and bf16 on tensor cores: one block of 256 threads with 24 queries. Tokens and queries go to shared memory at
    # once (LDGSTS), z or its parts in 16 bytes; the mask is narrow, and so are logits.
    "attend_on_tensor_cores_kernel": Expected(None, 255, 0, None, 0, None),
    # Likewise; what it attended to and the gradient of that are read 16 bytes at a time.
    "attend_backward_on_tensor_cores_kernel": Expected(None, 255, 0, None, 0, None),
    # Parts in one or two accesses, the result in one; the softmax of each part is narrow.
    "combine_splits_kernel": Expected(1, 128, 1, None, 1, None),
    # Basis and anchor on both sides; coefficients of the pairs are narrow.
    "gradients_kernel": Expected(3, 128, 4, None, 2, 0),
    # One block of 1,024 threads on the volumes, 16 KB at a batch of 64, in rows and in columns.
    "lines_kernel": Expected(None, 64, 0, None, 0, None),
    # One warp.
    "total_kernel": Expected(None, 255, 0, None, 0, None),
    # Loaded and never launched.
    "probe_kernel": Expected(None, 32, 0, None, 0, None),
}

MANY_SUMS = """
__global__ void sums_kernel(const float* x, float* y) {
  float sum[48] = {};
  for (int step = 0; step < 64; ++step) {
#pragma unroll
    for (int i = 0; i < 48; ++i) sum[i] = sum[i] * sum[(i + 1) % 48] + x[step * 48 + i];
  }
  for (int i = 0; i < 48; ++i) y[i] = sum[i];
}
"""
ONE_COPY = """
__global__ void copy_kernel(const {type}* x, {type}* y) {{ y[threadIdx.x] = x[threadIdx.x]; }}
"""


def vectorised(kernels):
    templates = [(k, EXPECTED[k.name].width_at) for k in kernels]
    return [k for k, width_at in templates if width_at is not None and k.moves_16_bytes(width_at)]


def test_every_kernel_of_csrc_is_known_here(kernels, architectures):
    assert {k.name for k in kernels} == set(EXPECTED), "name a new kernel's expectations in EXPECTED"
    for name in EXPECTED:
        assert {k.architecture for k in kernels if k.name == name} == set(architectures)


def test_nothing_spills(kernels):
    assert not [str(k) for k in kernels if k.spilled_bytes or k.stack_bytes]


def test_registers_let_the_blocks_fit(kernels):
    assert not [f"{k}: {k.registers}" for k in kernels if k.registers > EXPECTED[k.name].registers]


def test_three_blocks_that_select_in_fp32_fit_on_a_multiprocessor(kernels, architectures):
    selecting = [k for k in kernels if k.name == "select_tokens_kernel" and k.arguments == ("f", "4")]
    assert {k.architecture for k in selecting} == set(architectures)
    assert not [f"{k}: {k.registers}" for k in selecting if k.registers > 65536 // (3 * 256)]


def test_static_shared_memory_fits_any_device(kernels):
    assert not [f"{k}: {k.shared_bytes}" for k in kernels if k.shared_bytes > 48 * 1024]


def test_each_kernel_has_vectorised_instantiations(kernels):
    assert {k.name for k in vectorised(kernels)} == {name for name in EXPECTED if EXPECTED[name].width_at is not None}


def test_streams_are_loaded_16_bytes_at_a_time(disassembled):
    for kernel in vectorised(disassembled):
        expected = EXPECTED[kernel.name]
        assert kernel.count("LDG", wide=True) >= expected.wide_loads, kernel
        assert expected.narrow_loads is None or kernel.count("LDG", wide=False) <= expected.narrow_loads, kernel


def test_results_are_stored_16_bytes_at_a_time(disassembled):
    for kernel in vectorised(disassembled):
        expected = EXPECTED[kernel.name]
        assert kernel.count("STG", wide=True) >= expected.wide_stores, kernel
        assert expected.narrow_stores is None or kernel.count("STG", wide=False) <= expected.narrow_stores, kernel


def test_global_memory_is_addressed_as_such_and_nothing_lives_in_local_memory(disassembled):
    """A generic access (LD, ST) takes a slower path; local ones (LDL, STL) would be spills or indexed arrays."""
    for kernel in disassembled:
        assert not {name.split(".")[0] for name in kernel.opcodes} & {"LD", "ST", "LDL", "STL"}, kernel


def test_attention_in_low_precision_runs_on_tensor_cores(disassembled):
    """Products of its matrices (HMMA), which are loaded whole (LDSM), and copies past the registers (LDGSTS)."""
    kernels = [k for k in disassembled if "tensor_cores" in k.name]
    assert {(k.name, k.arguments, k.architecture) for k in kernels} == {
        (f"attend_{direction}on_tensor_cores_kernel", (dtype, queries), architecture)
        for direction in ("", "backward_")
        for dtype in ("6__half", "13__nv_bfloat16")
        for queries in ("16", "24")
        for architecture in ("sm_86", "sm_90")
    }
    for kernel in kernels:
        assert {"HMMA", "LDSM", "LDGSTS"} <= {name.split(".")[0] for name in kernel.opcodes}, kernel
        assert kernel.count("STG", wide=True) >= 2, kernel
        passes = 4 if "backward" in kernel.name else 2  # over 64 channels of 32 tokens
        products = sum(n for name, n in kernel.opcodes.items() if name.startswith("HMMA"))
        assert products == passes * int(kernel.arguments[1]), kernel


def test_a_spill_would_be_seen(compiled):
    assert compiled(MANY_SUMS, "-maxrregcount=24").spilled_bytes > 0


def test_narrow_and_wide_accesses_are_told_apart(compiled, cuobjdump):
    for kind, wide in (("float", False), ("float4", True)):
        kernel = compiled(ONE_COPY.format(type=kind), cuobjdump=cuobjdump)
        assert {opcode: kernel.count(opcode, wide) for opcode in ("LDG", "STG")} == {"LDG": 1, "STG": 1}
        assert not kernel.count("LDG", not wide)
