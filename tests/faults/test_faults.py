"""The part of the fault matrix that takes seconds."""

import os
import subprocess
import sys
from pathlib import Path

import signal_reid


def test_packing_and_synthesizing_survive_every_fault():
    root = Path(signal_reid.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("matrix.py"), "--quick"],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " cells, 0 not survived" in done.stdout
