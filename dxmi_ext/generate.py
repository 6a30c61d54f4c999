"""Samples of trained networks for the command ``sample``: guided, of classes, with a progress bar.

Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from dxmi_ext import noise, ops, runlog
from dxmi_ext.config import ConfigError
from dxmi_ext.networks import Networks


def samples(
    networks: Networks,
    n: int,
    seed: int,
    *,
    batch_size: int,
    guidance: float = 0.0,
    labels: str | None = None,
    classes: int | None = None,
) -> Tensor:
    """Samples [n, *] on the networks' device. Row i depends on (seed, i, its label) alone, up to the rounding
    of the networks' matrix products.

    Args:
        seed: of noise and random labels.
        batch_size: rows that the networks see at a time; more rows than that show a progress bar.
        guidance: lambda of value guidance (DxMI, sec. 4); 0: none.
        labels: as for `read_labels`; None: uniform, where there are classes.
        classes: how many; None: the networks take no labels.

    Raises:
        ConfigError: labels are bad, or given where there are none.
    """
    device = networks.sampler.log_std.device
    key = ops.noise_key(seed, device=device)
    given = None
    if classes is not None:
        draws = noise.Draws(seed, "labels of samples", ["labels"], device)
        given = read_labels(labels or "uniform", n, classes, draws.at(0)["labels"])
    elif labels is not None:
        raise ConfigError(f"labels: got {labels!r}, but the networks of this run take none")
    guide = networks.guide(guidance) if guidance else None
    parts = []
    with runlog.Progress("sample", n, 0, enabled=n > batch_size) as bar:
        for first in range(0, n, batch_size):
            count = min(batch_size, n - first)
            part = None if given is None else given[first : first + count]
            parts.append(
                networks.sampler.sample(
                    count, key, part, guide=guide, sample_offset=first, batch_size=batch_size
                )
            )
            bar.update(count)
    return torch.cat(parts)


def read_labels(text: str, n: int, classes: int, key: Tensor) -> Tensor:
    """The labels int64 [n], on the key's device, that a text asks for; label i does not depend on n.

    Args:
        text: ``3``: that class; ``0-9``, ``1,4`` or ``0-3,7``: these in turn; ``uniform``: each at random.
        classes: how many there are.
        key: of the random ones.

    Raises:
        ConfigError: the text is none of these, or names a class that there is not.
    """
    if text == "uniform":
        return noise.randint(classes, n, key)
    wanted: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last < classes:
            raise ConfigError(
                f"labels: got {text!r}, wants uniform, or classes below {classes}, as 3, 0-9 or 1,4"
            )
        wanted += range(first, last + 1)
    in_turn = torch.tensor(wanted, device=key.device)
    return in_turn[torch.arange(n, device=key.device) % len(wanted)]
