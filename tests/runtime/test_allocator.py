"""Memory that was freed stays with the process once it is asked to keep it."""

import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import torch
from signal_reid.runtime.allocator import keep_freed_memory

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
def test_a_freed_block_is_found_again_without_a_page_fault(forking):
    ended = forking.run(PROGRAM)
    assert ended.returncode == 0, ended.stderr
    kept, usual, after = map(int, ended.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert usual > 4 * 16  # at least a fault for every huge page of every block
    assert after < usual / 2  # now and then a block does not fit where the last one was


HUGE_PAGES = """
import torch
from signal_reid.runtime.allocator import keep_freed_memory

def huge():
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("AnonHugePages"))

kept = keep_freed_memory()
before = huge()
block = torch.ones(2**24)  # 64 MiB
print(int(kept), huge() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_the_heap_gets_huge_pages_where_programs_may_ask_for_them(forking):
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[madvise]" not in mode.read_text():
        pytest.skip("the system gives huge pages to all or to none")
    ended = forking.run(HUGE_PAGES)
    assert ended.returncode == 0, ended.stderr
    kept, kibibytes = map(int, ended.stdout.split())
    if not kept:
        pytest.skip("the C library is not glibc")
    assert kibibytes > 2**16 // 2  # memory may be too fragmented for some


@pytest.mark.skipif(sys.platform != "linux", reason="Linux")
def test_two_calls_ask_for_no_more_memory_than_one(forking):
    program = """
from signal_reid.runtime.allocator import keep_freed_memory

def size():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmSize"))

keep_freed_memory()
once = size()
keep_freed_memory()
print(size() - once)
"""
    ended = forking.run(program)
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 2**10
