"""Damages files and states at random: each is read as it was, or is refused in one line; nothing else may happen.

    PYTHONPATH=. python tests/fuzzing/fuzz.py KIND [--seconds 600] [--seed 0]

A finding prints the seed that repeats it (`--seed N --seconds 0`) and ends the program with exit code 1.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import fuzz_files
import fuzz_operators
import fuzz_states
from damage import Try, refused_or

KINDS: dict[str, Callable[[Path], Try]] = {
    "checkpoints": fuzz_files.checkpoint_files,
    "states": fuzz_states.states,
    "features": fuzz_files.features,
    "packed": fuzz_files.packed,
    "indexes": fuzz_files.indexes,
    "yaml": fuzz_files.yaml_files,
    "manifests": fuzz_files.manifests,
    "images": fuzz_files.images,
    "operators": fuzz_operators.operators,
}


def fuzz(kind: str, seconds: float, seed: int = 0, most: int | None = None) -> int:
    """Try seeds from the given one on; the number of tries.

    Args:
        kind: one of `KINDS`.
        seconds: to go on for; at least one seed is tried.
        seed: the first.
        most: tries to end after.

    Raises:
        Exception: what a seed found, with the seed in a note of its message on the standard error.
    """
    first = seed
    with tempfile.TemporaryDirectory() as folder:
        once = KINDS[kind](Path(folder))
        end = time.monotonic() + seconds
        while seed == first or (time.monotonic() < end and (most is None or seed < first + most)):
            try:
                refused_or(partial(once, random.Random(seed)))
            except Exception:
                print(f"found by: {kind} --seed {seed} --seconds 0", file=sys.stderr)
                raise
            seed += 1
    return seed - first


def limit_memory() -> None:
    """Let the process map 1 GiB more than it has, which a damaged file must not ask for."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, resource.RLIM_INFINITY))


def main() -> None:
    """Fuzz one kind and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    faulthandler.enable()
    if Path("/proc/self/statm").exists():
        limit_memory()
    try:
        print(f"{fuzz(arguments.kind, arguments.seconds, arguments.seed)} tries, nothing found")
    except Exception:
        traceback.print_exc()
        sys.exit(1)


if __name__ == "__main__":
    main()
