"""Freed memory of a service goes back to the system, whatever mixture of sizes it has met."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import sys
from pathlib import Path
from megatron_retro.runtime.allocator import return_freed_blocks

def resident_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024

assert sys.argv[1] == "as it is" or return_freed_blocks()
first = bytearray(8 << 20)
del first  # from here on glibc by itself takes blocks of up to this size from its heap
before, kept = resident_mb(), []
for _ in range(50):
    large = bytearray(2 << 20)
    large[::4096] = bytes(512)  # every page is touched
    kept.append((large, bytearray(5000)))
kept = [small for _, small in kept]  # small ones hold the heap's end
del large
print(resident_mb() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_freed_blocks_leave_the_process() -> None:
    grown = {
        way: float(
            subprocess.run([sys.executable, "-c", PROGRAM, way], capture_output=True, check=True, text=True).stdout
        )
        for way in ("as it is", "returned")
    }
    assert grown["returned"] < 5 < 50 < grown["as it is"]
