"""How networks run: precision, memory format, compilation, and switches of the CUDA libraries.

These settings only affect rounding and speed. Optimizers, averages, samples, row results and losses keep the
dtype of the weights, float32 or float64. Imports torch and the engine.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dxmi_ext.engine.compute.calls import networks_in
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.settings import ConfigError, Settings, setting

BACKEND = "inductor"
"""Backend of torch.compile."""

VARIANTS = 64
"""Number of graphs per forward before torch.compile falls back to eager mode. Networks are called with and
without gradients, with frozen weights, on B and 2B rows; torch counts all networks of a class together."""


@dataclasses.dataclass
class ExecutionSettings(Settings):
    """Precision, memory format and compilation of the networks, in pretraining and DxMI.

    TF32 is on by default: it rounds the factors of a product to 10 of 23 bits of mantissa and accumulates in
    float32, which is still more precise than bfloat16's 7 bits, and several times as fast; torch enables it
    for convolutions by default.
    """

    heading = "how the networks run"
    precision: str = setting(
        "float32",
        "precision of the networks; bfloat16 uses torch.autocast, and is slow on CPUs without AVX-512",
        choices=("float32", "bfloat16"),
    )
    channels_last: bool = setting(False, "channels_last memory format for images and convolutions")
    compile: bool = setting(False, "torch.compile for the networks; requires a C++ compiler, on CUDA Triton")
    cuda_graph: bool = setting(False, "one CUDA graph for DxMI's iteration; requires batches of one shape")
    tf32: bool = setting(True, "TF32 for float32 products and convolutions on CUDA; false: full float32")


def prepare(
    settings: ExecutionSettings, *networks: nn.Module | None, data_shape: Sequence[int] | None = None
) -> torch.memory_format:
    """Applies memory format and compilation to networks, in place, before they are wrapped. Names of weights,
    and so checkpoints, do not change. May be called again on the same networks.

    Args:
        networks: networks to prepare.
        data_shape: shape of a sample; None: not known yet.

    Returns:
        The memory format for their data.

    Raises:
        ConfigError: channels_last is set but the data are not images, or compile is set but torch.compile
            does not work here.
    """
    found = [network for network in networks if network is not None]
    if settings.channels_last:
        if data_shape is not None and len(data_shape) != 3:
            raise ConfigError(
                f"channels_last must be false unless data are images [C, H, W], got true and {[*data_shape]}"
            )
        for network in found:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.compile:
        _try_compiler(next(found[0].parameters()).device)
        # diffusers looks up torch's version through a cached function, which Dynamo may trace safely.
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`", UserWarning)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        for network in found:
            network.compile(backend=BACKEND, dynamic=False)  # batches have B or 2B rows
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def check_graph(settings: ExecutionSettings, device: torch.device, ranks: Ranks) -> None:
    """Checks that a CUDA graph is supported.

    Raises:
        ConfigError: cuda_graph is set without a CUDA device, or with several ranks.
    """
    if settings.cuda_graph and (device.type != "cuda" or not ranks.alone):
        raise ConfigError(
            "cuda_graph must be false without a CUDA device or with several ranks, got true on "
            f"{device.type} with {ranks.world_size} rank(s)"
        )


def emulates_bfloat16(device: torch.device) -> bool:
    """Whether a CPU lacks what bfloat16 networks need to be as fast as float32 ones: oneDNN, and AVX-512 on
    x86-64 or BF16 on aarch64."""
    if device.type != "cpu":
        return False
    return not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported()


@contextmanager
def running(settings: ExecutionSettings, device: torch.device) -> Iterator[None]:
    """Within, networks run with these settings. Global settings of torch are restored afterwards.

    cuDNN benchmarks its algorithms on the first call for each shape, and the choice may differ from run to
    run, unless ``torch.use_deterministic_algorithms`` is set.
    """
    with networks_in(torch.bfloat16 if settings.precision == "bfloat16" else None):
        if device.type != "cuda":
            yield
            return
        matmul: Any = torch.backends.cuda.matmul
        cudnn: Any = torch.backends.cudnn
        kept = matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark
        repeatable = torch.are_deterministic_algorithms_enabled() or cudnn.deterministic
        matmul.fp32_precision = cudnn.conv.fp32_precision = "tf32" if settings.tf32 else "ieee"
        cudnn.benchmark = not repeatable
        try:
            yield
        finally:
            matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark = kept


def _try_compiler(device: torch.device) -> None:
    """Compiles a trivial function, so that a missing compiler is reported at the start."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        reason = next(iter(str(inner).splitlines()), type(inner).__name__)
        raise ConfigError(
            f"compile must be false where torch.compile does not work, got true on {device.type}: {reason}"
        ) from error
