"""Compiles the CUDA kernels for the emulator in emulator/, and registers them as torch.ops.dxmi_emulated."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
TORCH = Path(torch.__file__).parent


@cache
def load() -> None:
    """Registers the emulated ops; builds them into build/ unless the sources are unchanged."""
    folder = HERE.parent / "build" / "emulator"
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted(p for p in [*CSRC.rglob("*"), *(HERE / "emulator").iterdir()] if p.is_file())
    sanitize = os.environ.get("DXMI_SANITIZE", "")
    digest = hashlib.sha256(sanitize.encode() + torch.__version__.encode())
    for path in sources:
        digest.update(path.read_bytes())
    library = folder / f"{digest.hexdigest()[:16]}.so"
    if not library.exists():
        build(library, sanitize)
    torch.ops.load_library(str(library))


def build(library: Path, sanitize: str) -> None:
    """Compiles the CUDA half with a C++ compiler; -ffp-contract=off as everywhere, to compare bits."""
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"the emulated CUDA kernels require a C++ compiler; there is no {compiler}")
    # A single translation unit takes a third of the time.
    sources = [*(CSRC / "ops").glob("*.cpp"), *(CSRC / "cuda").glob("*.cu")]
    unfinished = library.with_suffix(f".{os.getpid()}")
    command = [
        *(compiler, "-std=gnu++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared"),
        *("-fvisibility=hidden", "-Wall", "-Wextra", "-Werror", "-DDXMI_FOR_CUDA", "-DDXMI_EMULATE"),
        *("-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020a000000000000ULL", f"-I{CSRC}", f"-I{HERE / 'emulator'}"),
        *(f"-isystem{TORCH / 'include'}", *(f"-include{path}" for path in sorted(sources))),
        *(str(HERE / "emulator" / "module.cpp"), f"-L{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu"),
        *([f"-fsanitize={sanitize}", "-g"] if sanitize else []),
        *("-o", str(unfinished)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.fail(f"the emulated CUDA kernels do not compile:\n{done.stderr}", pytrace=False)
    unfinished.rename(library)
