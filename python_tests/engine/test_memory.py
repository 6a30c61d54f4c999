"""Memory that the process keeps."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest
import torch

from dxmi_ext.engine.compute import memory


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is part of glibc")
def test_freed_memory_stays_with_the_process() -> None:
    memory.keep_freed()
    block = torch.ones(2**24)  # 16,384 pages
    before = resident_pages()
    del block
    assert before - resident_pages() < 1000
