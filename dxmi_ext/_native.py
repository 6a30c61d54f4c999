"""Loads the compiled module of the package and describes it. Imports torch alone."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import NoReturn

import torch

try:
    import dxmi_ext._C as _C
except ModuleNotFoundError as error:
    raise ImportError(
        "dxmi_ext has no compiled module. If this is its source folder, install it: `pip install .`, or "
        "`pip install -e .` to work on it"
    ) from error
except ImportError as error:
    if "DXMI_CPU_VARIANT" in str(error):  # it says what is wrong
        raise
    raise ImportError(
        f"dxmi_ext's compiled module does not load with torch {torch.__version__}: {error}. It requires "
        "torch >= 2.10 and the C++ runtime libraries it was built with"
    ) from error


def cpu_variants() -> list[str]:
    """Instruction-set variants of the CPU kernels that this processor supports, fastest first."""
    return _C.cpu_variants()


def cpu_variant() -> str:
    """The variant in use: the fastest, or the one named by the environment variable DXMI_CPU_VARIANT."""
    return _C.cpu_variant()


def cuda_status() -> str:
    """The reason why the ops do not run on CUDA tensors; empty if they do."""
    return _cuda_status


def driver_cuda() -> str:
    """The newest CUDA version that the driver supports, e.g. "13.0"; empty without a driver."""
    version = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return ""
    return "" if failed else f"{version.value // 1000}.{version.value % 1000 // 10}"


def build_info() -> dict[str, str]:
    """How the compiled module was built and what is available here, for `dxmi info` and bug reports."""
    if _C.cuda_left_out:
        kernels = f"none ({_C.cuda_left_out})"
    else:
        kernels = f"nvcc {_C.nvcc}, architectures {_C.cuda_architectures}"
        kernels += f"; not in use: {_cuda_status}" if _cuda_status else ""
    return {
        "built with torch": _C.torch_headers,
        "compiler": _C.compiler,
        "CPU kernels": f"{cpu_variant()} (usable here: {', '.join(cpu_variants())})",
        "CUDA kernels": kernels,
        "CUDA of torch": torch.version.cuda or "none",
        "CUDA of the driver": driver_cuda() or "none",
    }


def _load_cuda_half() -> str:
    """Loads the CUDA kernels if torch has CUDA; returns the reason if it cannot."""
    if _C.cuda_left_out:
        return (
            f"dxmi_ext was built without CUDA kernels ({_C.cuda_left_out}). Move the tensors to the CPU, or "
            "install dxmi_ext again where torch has CUDA and nvcc is on PATH"
        )
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build; install one with CUDA"
    driver = driver_cuda()
    if driver and int(driver.split(".")[0]) < int(_C.nvcc.split(".")[0]):
        return (
            f"dxmi_ext was built by nvcc {_C.nvcc}, but the driver runs CUDA {driver} at most. Update the "
            "driver, or install dxmi_ext again with an older nvcc"
        )
    try:
        torch.ops.load_library(str(Path(_C.__file__).with_name("_cuda.so")))
    except OSError as error:
        return f"the CUDA kernels could not be loaded: {error.__cause__ or error}"
    return ""


def _refuse_cuda_tensors() -> torch.library.Library:
    """Raises an error with a remedy for CUDA tensors, without overhead on the CPU."""

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        raise RuntimeError(f"dxmi_ext has no kernels for CUDA tensors: {_cuda_status}")

    library = torch.library.Library("dxmi_ext", "IMPL", "CUDA")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("dxmi_ext::"):
            library.impl(name, refuse)
    return library


_cuda_status = _load_cuda_half()
_cuda_refusals = _refuse_cuda_tensors() if _cuda_status else None
