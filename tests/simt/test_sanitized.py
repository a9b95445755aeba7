"""The kernels' tests pass under the address and undefined-behaviour sanitizers."""

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
KERNELS = ["token_selection", "gramian_volume", "deformable_sampling"]


def test_kernels_touch_only_what_is_theirs(simt_build):
    files = [HERE / f"test_{kernel}.py" for kernel in KERNELS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "--capture=sys", *(str(f) for f in files if f.exists())],
        env={
            **simt_build.sanitizer_environment(),
            "SIGNAL_REID_SIMT_SANITIZE": "1",
            "SIGNAL_REID_SIMT_EXAMPLES": "6",
            "PYTHONPATH": str(simt_build.ROOT),
        },
        cwd=simt_build.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
