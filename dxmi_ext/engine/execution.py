"""How networks run: precision, memory format, compilation, and the library switches of CUDA.

Nothing here changes what is learned but its rounding. Weights, optimizers, averages, samples, row results and
losses are float32 whatever the settings. Imports torch and the engine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dxmi_ext.engine.calls import networks_in
from dxmi_ext.engine.ranks import Ranks
from dxmi_ext.engine.settings import ConfigError, Settings, setting

BACKEND = "inductor"
"""Of torch.compile."""

VARIANTS = 64
"""Graphs that torch.compile keeps of a forward before it gives up. Networks are called with and without a
graph, with frozen weights, on B and 2B rows; and torch counts all networks of a class together."""


@dataclasses.dataclass
class ExecutionSettings(Settings):
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
    cuda_graph: bool = setting(False, "DxMI's whole iteration as one CUDA graph; needs batches of one shape")
    tf32: bool = setting(True, "float32 products and convolutions on CUDA in TF32; false: in full float32")


def prepare(
    settings: ExecutionSettings, *networks: nn.Module | None, data_shape: Sequence[int]
) -> torch.memory_format:
    """Makes networks ready for their settings, in place, before anything wraps them. Names of weights, and so
    checkpoints, stay as they are. What is prepared already may be prepared again.

    Args:
        networks: those there are.
        data_shape: of a row of their data.

    Returns:
        The memory format that their data are to have.

    Raises:
        ConfigError: channels_last, and the data are no images; compile, and torch.compile does not work here.
    """
    found = [network for network in networks if network is not None]
    if settings.channels_last:
        if len(data_shape) != 3:
            raise ConfigError(
                f"channels_last must be false unless data are images [C, H, W], got true and {[*data_shape]}"
            )
        for network in found:
            network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if settings.compile:
        _try_compiler(next(found[0].parameters()).device)
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        for network in found:
            network.compile(backend=BACKEND, dynamic=False)  # batches of one size, and that doubled
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def check_graph(settings: ExecutionSettings, device: torch.device, ranks: Ranks) -> None:
    """Refuses a CUDA graph where there can be none.

    Raises:
        ConfigError: it is wanted without a CUDA device, or with several ranks.
    """
    if settings.cuda_graph and (device.type != "cuda" or not ranks.alone):
        raise ConfigError(
            "cuda_graph must be false without a CUDA device or with several ranks, got true on "
            f"{device.type} with {ranks.world_size} rank(s)"
        )


@contextmanager
def running(settings: ExecutionSettings, device: torch.device) -> Iterator[None]:
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
