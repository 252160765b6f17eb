"""Freed memory goes back to the system; each case in a process of its own, for the settings stay."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRELUDE = """
import ctypes
from macosnet_hf.io.memory import give_memory_back, keep_memory, trim

libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]

def taken(size):
    address = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(address, 1, size)
    return address

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 1e6
"""

# As after an image of 16 MB was freed once: the next one lies on the heap, under something small that stays.
LARGE = """
libc.free(taken(16 << 20))
before = resident()
large = taken(16 << 20)
small = taken(1000)
libc.free(large)
print(resident() - before)
"""
# A tensor of a batch.
BATCH = """
before = resident()
libc.free(taken(16 << 20))
print(resident() - before)
"""
# 2,000 pieces of 30 kB, of which one in a hundred stays.
SMALL = """
before = resident()
pieces = [taken(30_000) for _ in range(2000)]
for number, piece in enumerate(pieces):
    if number % 100:
        libc.free(piece)
{trim}
print(resident() - before)
"""


def _grown(code: str) -> float:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library has another allocator")
    command = [sys.executable, "-c", PRELUDE + code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)


def test_memory_of_a_batch_that_is_freed_serves_the_next():
    assert _grown(BATCH) < 2, "else there is nothing to do"
    assert _grown("keep_memory()\n" + BATCH) > 15


def test_a_large_image_that_is_freed_takes_nothing_any_more():
    assert _grown(LARGE) > 15, "else there is nothing to mend"
    assert _grown("give_memory_back()\n" + LARGE) < 2


def test_trim_gives_back_what_lies_between_the_pieces_that_stay():
    assert _grown(SMALL.format(trim="")) > 50, "else there is nothing to mend"
    assert _grown(SMALL.format(trim="trim()")) < 10


def test_where_the_c_library_is_another_nothing_happens(monkeypatch):
    from macosnet_hf.io import memory

    monkeypatch.setattr(memory, "_C_LIBRARY", "libc.of.nobody")
    memory.give_memory_back()
    memory.trim()
