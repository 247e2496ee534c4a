"""While weights are loaded to a GPU, large host buffers are not taken from the system each time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# In a process of its own, since it changes the allocator's settings. Faults are counted in pages.
_PROGRAM = """
import ctypes, json, resource
from k2cli.rank.host_buffers import reused_host_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
SIZE = 64 * 2**20

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def filled():
    before = faults()
    block = libc.malloc(SIZE)
    ctypes.memset(block, 1, SIZE)
    libc.free(block)
    return faults() - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

found = {"before": [filled(), filled()]}
with reused_host_memory():
    found["within"] = [filled(), filled(), filled()]
    found["held"] = resident()
found["after"] = [filled(), filled()]
found["left"] = resident()
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA is for Linux")
def test_freed_memory_is_used_again_while_loading_and_returned_afterwards() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, check=True)
    found = json.loads(done.stdout)
    pages = 64 * 2**20 // 4096
    first, *others = found["within"]
    assert first > 10
    assert max(others) < pages // 100
    # Outside, each block comes from the system and goes back to it.
    huge_pages = 64 // 2
    assert min(found["before"] + found["after"]) >= huge_pages
    assert found["held"] - found["left"] > 48 * 2**20
