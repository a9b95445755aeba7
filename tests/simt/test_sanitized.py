"""The operators' cases pass on the emulated CUDA kernels under the address and undefined-behaviour sanitizers."""

import subprocess
import sys

OPERATORS = [
    "token_selection",
    "gramian",
    "gramian_loss",
    "deformable_sampling",
    "masked_attention",
    "offset_head",
    "pairwise_error",
    "activation",
    "residual_norm",
]


def test_kernels_touch_only_what_is_theirs(simt_build):
    files = [f"tests/ops/test_{operator}.py" for operator in OPERATORS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--capture=sys", "-k", "cuda", *files],
        env={
            **simt_build.sanitizer_environment(),
            "SIGNAL_REID_SIMT_SANITIZE": "1",
            "SIGNAL_REID_SIMT_EXAMPLES": "3",
            "PYTHONPATH": str(simt_build.ROOT),
        },
        cwd=simt_build.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
