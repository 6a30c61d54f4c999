"""Loads the compiled half of the package and tells what it holds. Imports torch alone."""

from __future__ import annotations

from typing import NoReturn

import torch

try:
    from dxmi_ext import _C  # type: ignore[attr-defined]
except ImportError as error:
    raise ImportError(
        "dxmi_ext has no compiled module. If this is its source folder, run from another one after "
        "`pip install .`, or install it with `pip install -e .`"
    ) from error

NO_CUDA_HALF = (
    "dxmi_ext was built without its CUDA half, so its ops run on CPU tensors only. Move the tensors to the "
    "CPU, or use a version of dxmi_ext that has CUDA kernels and build it where nvcc is installed"
)


def cpu_variants() -> list[str]:
    """Instruction-set variants of the CPU kernels that this processor runs, fastest first."""
    return _C.cpu_variants()


def cpu_variant() -> str:
    """The variant in use: the fastest, or what the environment variable DXMI_CPU_VARIANT names."""
    return _C.cpu_variant()


def cuda_build() -> str:
    """What the CUDA half was built for; empty if there is none."""
    return _C.cuda


def build_info() -> dict[str, str]:
    """How the compiled half was built, for `dxmi info` and bug reports."""
    return {
        "built with torch": _C.torch_headers,
        "compiler": _C.compiler,
        "CPU kernels": f"{cpu_variant()} (usable here: {', '.join(cpu_variants())})",
        "CUDA kernels": cuda_build() or f"none: {NO_CUDA_HALF}",
    }


def _refuse_cuda_tensors() -> torch.library.Library:
    """Answers a CUDA tensor with a remedy, at no cost to calls on the CPU."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(NO_CUDA_HALF)

    library = torch.library.Library("dxmi_ext", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dxmi_ext::"):
            library.impl(name, refuse)
    return library


_cuda_refusals = None if cuda_build() else _refuse_cuda_tensors()
