"""Freed memory stays with the process."""

import ctypes

import pytest
from commands import run

from ssd import memory

SECOND_USE = """
import resource, runpy, sys
if sys.argv[2] == "keep":
    runpy.run_path(sys.argv[1])["keep_freed_memory"]()
for _ in range(2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    b"x" * 2**26
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.pythonapi, "mallopt"), reason="needs glibc")
def test_a_second_large_block_brings_no_new_pages():
    faults = {}
    for what in ("keep", "return"):
        faults[what] = int(run("-c", SECOND_USE, memory.__file__, what))
    assert faults["keep"] < 16 < faults["return"], faults
