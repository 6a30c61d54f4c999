"""Draws samples of trained networks in batches; ``engine.output.samples`` writes them.

Imports torch, the engine and the method.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.settings import ConfigError, Settings, device_setting, seed_setting, setting
from dxmi_ext.method import noise
from dxmi_ext.method.langevin import Langevin
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler

_BATCH_NUMBERS = 2**20  # 341 images of 3 x 32 x 32
_LARGEST_BATCH = 4096


@dataclasses.dataclass
class SampleSettings(Settings):
    """Settings of the command ``sample``."""

    n: int | None = setting(
        None, "number of samples; null: 64 in a grid, else 10000", minimum=1, maximum=10**8
    )
    output: str | None = setting(
        None,
        "FILE.npz: arrays; for images also FOLDER/: a png for each, FILE.png: a grid; null: RUN/samples.npz, "
        "or NAME-samples.npz for a run that ships with the package",
        path=True,
    )
    seed: int = seed_setting("seed of the noise")
    batch_size: int | None = setting(
        None, "batch size of each rank; null: chosen by the size of a sample, at most 4096", minimum=1
    )
    steps: int | None = setting(
        None,
        "number of steps T, for a sampler of several lengths or of any length; null: the run's steps",
        minimum=1,
    )
    guidance: float = setting(0.0, "scale lambda of value guidance; at most .5 in the paper", minimum=0)
    labels: str | None = setting(
        None, "classes of a conditional run: 3; 0-9 or 1,4 in turn; uniform or null: at random"
    )
    device: str = device_setting()


def batches(
    networks: Networks,
    rows: range,
    seed: int,
    *,
    batch_size: int | None = None,
    guidance: float = 0.0,
    labels: str | None = None,
    classes: int | None = None,
    steps: int | None = None,
    chains: Langevin | None = None,
    start: Callable[[int, int], Tensor] | None = None,
) -> Iterator[Batch]:
    """Samples on the networks' device, in batches. Row i depends on (seed, i, its label) alone, up to the
    rounding of the networks' matrix products.

    Args:
        rows: consecutive indices i of the samples.
        seed: seed of noise and random labels.
        batch_size: rows per call of the networks; None: 2^20 numbers, at most 4096 rows.
        guidance: scale lambda of value guidance; 0: no guidance.
        labels: text for `read_labels`; None: uniform if there are classes.
        classes: number of classes; None: the networks take no labels.
        steps: T, one that the sampler has; None: the current one.
        chains: Langevin chains to draw from instead of the sampler.
        start: (first row, count) -> data [count, *] that a sampler with a ``start`` begins from.

    Raises:
        ConfigError: labels are invalid or not supported, guidance is given for chains, or the sampler does
            not have this T.
    """
    if steps is not None:
        use_steps(networks.sampler, steps)
    device, shape = networks.sampler.log_std.device, networks.sampler.data_shape
    key = ops.noise_key(seed, device=device)
    given = None
    if classes is not None:
        draws = noise.Draws(seed, "labels of samples", ["labels"], device)
        given = read_labels(labels or "uniform", rows.stop, classes, draws.at(0)["labels"])
    elif labels is not None:
        raise ConfigError(f"labels must be null for networks without classes, got {labels!r}")
    draw: Any
    if chains is None:
        draw = functools.partial(
            networks.sampler.sample, guide=networks.guide(guidance) if guidance else None
        )
    elif guidance:
        raise ConfigError(f"guidance must be 0 for a run of Langevin chains, got {guidance}")
    else:
        draw = functools.partial(chains.sample, networks)
    size = batch_size or max(1, min(_LARGEST_BATCH, _BATCH_NUMBERS // max(1, math.prod(shape))))

    def drawn() -> Iterator[Batch]:  # a generator, so that errors are raised at the call
        for first in range(rows.start, rows.stop, size):
            count = min(size, rows.stop - first)
            part = None if given is None else given[first : first + count]
            data = {} if start is None else {"data": start(first, count)}
            yield Batch(draw(count, key, part, sample_offset=first, batch_size=size, **data), part)

    return drawn()


def use_steps(sampler: GaussianSampler, steps: int) -> None:
    """Sets the number of steps of the chains of a sampler.

    Raises:
        ConfigError: the sampler has no chain of this length.
    """
    try:
        sampler.use(steps)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def read_labels(text: str, n: int, classes: int, key: Tensor) -> Tensor:
    """Labels int64 [n] given as text, on the key's device; label i does not depend on n.

    Args:
        text: ``3``: one class; ``0-9``, ``1,4`` or ``0-3,7``: these in turn; ``uniform``: random classes.
        classes: number of classes.
        key: noise key of random labels.

    Raises:
        ConfigError: the text has another form or names a class >= ``classes``.
    """
    if text == "uniform":
        return noise.randint(classes, n, key)
    wanted: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < classes:
            raise ConfigError(
                f"labels must be uniform or classes < {classes}, such as 3, 0-9 or 1,4, got {text!r}"
            )
        wanted += range(first, last + 1)
    in_turn = torch.tensor(wanted, device=key.device)
    return in_turn[torch.arange(n, device=key.device) % len(wanted)]
