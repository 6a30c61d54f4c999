"""Memory that the process keeps."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
from pathlib import Path
import torch
from dxmi_ext.engine.compute import memory

def resident_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])

memory.keep_freed()
block = torch.ones(2**24)  # 16,384 pages
before = resident_pages()
del block
print(before - resident_pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is part of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    freed = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True).stdout
    assert int(freed) < 1000
