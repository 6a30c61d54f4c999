"""How the networks run: precision, memory format, compilation, and the library switches of CUDA.

Nothing here changes what is learned but its rounding. Weights, optimizers, averages, samples, row results and
losses are float32 whatever the settings. Imports torch, ``dxmi_ext.config`` and ``dxmi_ext.sampler``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dxmi_ext.config import ConfigError, Settings, setting
from dxmi_ext.sampler import GaussianSampler, networks_in

BACKEND = "inductor"
"""Of torch.compile."""

VARIANTS = 64
"""Graphs that torch.compile keeps of a forward before it gives up. Networks are called with and without a
graph, with frozen weights, on B and 2B rows; and torch counts all networks of a class together."""


@dataclasses.dataclass
class SpeedSettings(Settings):
    """Settings of how the networks run, in pretraining and DxMI alike.

    TF32 is on by default: it reads 10 of a product's 23 bits of mantissa and sums in float32, which is still
    finer than bfloat16's 7, and is several times as fast; torch has it on for convolutions in any case.
    """

    heading = "how the networks run"
    precision: str = setting(
        "float32", "of the networks; bfloat16: by torch.autocast", choices=("float32", "bfloat16")
    )
    channels_last: bool = setting(False, "images and weights of convolutions in memory with channels last")
    compile: bool = setting(False, "networks by torch.compile; wants a C++ compiler, on CUDA triton")
    tf32: bool = setting(True, "float32 products and convolutions on CUDA in TF32; false: in full float32")


def prepare(settings: SpeedSettings, sampler: GaussianSampler, *others: nn.Module | None) -> None:
    """Makes networks ready for their settings, in place, before anything wraps them. Names of weights, and so
    checkpoints, stay as they are. What is prepared already may be prepared again.

    Args:
        sampler: its network, and the samples that it makes.
        others: the value and an energy.

    Raises:
        ConfigError: channels_last, and the data are no images; compile, and torch.compile does not work here.
    """
    networks = [sampler.network, *(other for other in others if other is not None)]
    if settings.channels_last:
        if len(sampler.data_shape) != 3:
            raise ConfigError(
                f"channels_last: got true, wants data of images [C, H, W]; these are {[*sampler.data_shape]}"
            )
        sampler.memory_format = torch.channels_last
        for network in networks:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.compile:
        _try_compiler(sampler.log_std.device)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        for network in networks:
            network.compile(backend=BACKEND, dynamic=False)  # batches of one size, and that doubled


@contextmanager
def running(settings: SpeedSettings, device: torch.device) -> Iterator[None]:
    """Within, networks run as the settings say. What torch holds for the whole process is put back.

    cuDNN tries its algorithms out on the first call of each shape, and the choice may differ from run to run;
    not where deterministic algorithms are asked for (``torch.use_deterministic_algorithms``).
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
    """Compiles a line, so that what is missing shows before anything has begun."""
    try:
        torch.compile(lambda x: x + 1, backend=BACKEND)(torch.zeros(2, device=device))
    except Exception as error:
        inner = getattr(error, "inner_exception", error)
        reason = next(iter(str(inner).splitlines()), type(inner).__name__)
        raise ConfigError(
            f"compile: got true, but torch.compile does not work on this machine's {device.type}: {reason}"
        ) from error
