"""Memory that was freed stays with the process once it is asked to keep it."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from signal_reid.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = faults()
kept = keep_freed_memory()
for _ in range(4):
    torch.ones(2**24)
print(int(kept), usual, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_a_freed_block_is_found_again_without_a_page_fault():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    kept, usual, after = map(int, done.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert usual > 4 * 16  # at least a fault for every huge page of every block
    assert after < usual / 2  # now and then a block does not fit where the last one was
