"""Samples of trained networks, as the command ``sample`` writes them: arrays, pictures or a grid.

Every rank draws rows of its own, of every size of batch the same ones; the first rank writes.
Imports torch, numpy and ``dxmi_ext``; Pillow where pictures are written.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dxmi_ext import files, folders, noise, ops, plots, runlog
from dxmi_ext.config import ConfigError, Settings, device_setting, seed_setting, setting
from dxmi_ext.data.images import to_uint8
from dxmi_ext.langevin import Langevin
from dxmi_ext.networks import Networks
from dxmi_ext.ranks import Ranks

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
        "FILE.npz: arrays; of images also FOLDER/: a png each, FILE.png: a grid; null: RUN/samples.npz",
        path=True,
    )
    seed: int = seed_setting("seed of the noise")
    batch_size: int | None = setting(
        None, "rows that a rank's networks see at a time; null: by the size of a row, at most 4096", minimum=1
    )
    steps: int | None = setting(
        None, "T, of a run whose sampler knows several; null: the run's own", minimum=1
    )
    guidance: float = setting(0.0, "lambda of value guidance; the paper's are at most .5", minimum=0)
    labels: str | None = setting(
        None, "classes, where networks take them: 3, or in turn 0-9 or 1,4; uniform, or null: at random"
    )
    device: str = device_setting()


class Batch(NamedTuple):
    """Consecutive rows."""

    samples: Tensor
    """[m, *]"""
    labels: Tensor | None
    """int64 [m]; None where the networks take none."""


def rows_of(n: int, ranks: Ranks) -> range:
    """A rank's rows of n: as many on each, so the last ranks' may lie beyond n; `write` drops those."""
    count = math.ceil(n / ranks.world_size)
    return range(ranks.rank * count, (ranks.rank + 1) * count)


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
    """Samples on the networks' device, batch after batch. Row i depends on (seed, i, its label) alone, up to
    the rounding of the networks' matrix products.

    Args:
        rows: which ones, i; consecutive.
        seed: of noise and random labels.
        batch_size: rows that the networks see at a time; None: as many as hold 2^20 numbers, at most 4096.
        guidance: lambda of value guidance (DxMI, sec. 4); 0: none.
        labels: as for `read_labels`; None: uniform, where there are classes.
        classes: how many; None: the networks take no labels.
        steps: T, one of the sampler's ``lengths``; None: the one in use.
        chains: where these end, in place of the sampler's samples.
        start: first row, count -> the data [count, *] that a sampler which wants some starts these rows from.

    Raises:
        ConfigError: labels are bad, or given where there are none, or chains are to be guided; or the sampler
            knows no such T.
    """
    if steps is not None:
        try:
            networks.sampler.use(steps)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    device, shape = networks.sampler.log_std.device, networks.sampler.data_shape
    key = ops.noise_key(seed, device=device)
    given = None
    if classes is not None:
        draws = noise.Draws(seed, "labels of samples", ["labels"], device)
        given = read_labels(labels or "uniform", rows.stop, classes, draws.at(0)["labels"])
    elif labels is not None:
        raise ConfigError(f"labels: got {labels!r}, but the networks of this run take none")
    draw: Any
    if chains is None:
        draw = functools.partial(
            networks.sampler.sample, guide=networks.guide(guidance) if guidance else None
        )
    elif guidance:
        raise ConfigError(f"guidance: got {guidance}, but the run has Langevin chains, not a sampler")
    else:
        draw = functools.partial(chains.sample, networks)
    size = batch_size or max(1, min(_LARGEST_BATCH, _BATCH_NUMBERS // max(1, math.prod(shape))))

    def drawn() -> Iterator[Batch]:  # so that mistakes are told at the call
        for first in range(rows.start, rows.stop, size):
            count = min(size, rows.stop - first)
            part = None if given is None else given[first : first + count]
            data = {} if start is None else {"data": start(first, count)}
            yield Batch(draw(count, key, part, sample_offset=first, batch_size=size, **data), part)

    return drawn()


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


def check_output(output: str) -> None:
    """Refuses what `write` could not write, before anything is drawn.

    Raises:
        ConfigError: the name says none of its forms.
        FolderError: something lies there that `write` did not write.
    """
    path = Path(output)
    if output.endswith("/"):
        folders.check_new(path)
    elif path.suffix == ".npz":
        folders.check_file(path, folders.is_samples, "one of samples")
    elif path.suffix == ".png":
        folders.check_file(path, folders.is_picture, "a grid of samples")
    else:
        raise ConfigError(f"output: got {output!r}, wants FILE.npz, FILE.png or FOLDER/")


def write(output: str, n: int, drawn: Iterable[Batch], ranks: Ranks | None = None) -> str:
    """Writes samples, complete or not at all, in the form that the output's name says.

    Samples [m, C, H, W] with C 1 or 3 are images, and become uint8. ``FILE.npz`` holds "samples" [n, *], and
    "labels" int64 [n] where there are any; ``FOLDER/`` a picture each, 000000.png and so on; ``FILE.png`` a
    grid of all.

    Args:
        output: as `check_output` lets pass.
        n: samples of all ranks.
        drawn: `batches` of this rank's `rows_of`.
        ranks: all of them call this, the first writes.

    Returns:
        what was written, in words; of other ranks than the first, nothing.

    Raises:
        ConfigError: pictures are wanted of what are no images.
    """
    ranks, path = ranks or Ranks(), Path(output)
    parts = _gathered(drawn, n, ranks)
    if not ranks.first:
        for _ in parts:
            pass
        return ""
    if output.endswith("/"):
        _write_folder(path, n, parts)
        return f"{n} pictures"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.file(path) as file:  # at once: what cannot be written is told before hours of drawing
        if path.suffix == ".png":
            arrays = _joined(n, map(_of_images, parts))
            plots.images(file, torch.from_numpy(arrays["samples"]))
            return f"a grid of {n}"
        arrays = _joined(n, parts)
        np.savez(file, **arrays)
    return ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items())


_Part = tuple[int, dict[str, np.ndarray]]
"""The first of some consecutive rows, and their arrays."""


def _gathered(drawn: Iterable[Batch], n: int, ranks: Ranks) -> Iterator[_Part]:
    """The parts of all ranks on the first, nothing on others; a batch of each at a time."""
    count, done = len(rows_of(n, ranks)), 0
    with runlog.Progress("sample", n, 0, enabled=ranks.first) as bar:
        for batch in drawn:
            arrays = {"samples": to_uint8(batch.samples) if _is_images(batch.samples) else batch.samples}
            if batch.labels is not None:
                arrays["labels"] = batch.labels
            everyones = {name: _gather(array.cpu().contiguous(), ranks) for name, array in arrays.items()}
            for rank, values in enumerate(zip(*everyones.values(), strict=True)):
                first = rank * count + done
                keep = min(len(batch.samples), n - first)
                if keep > 0:
                    yield first, {k: v[:keep].numpy() for k, v in zip(everyones, values, strict=True)}
                    bar.update(keep)
            done += len(batch.samples)


def _gather(rows: Tensor, ranks: Ranks) -> list[Tensor]:
    """CPU tensors of one shape, of each rank, on the first; none on the others."""
    if ranks.alone:
        return [rows]
    parts = [torch.empty_like(rows) for _ in range(ranks.world_size)] if ranks.first else None
    dist.gather(rows, parts, group=ranks.control)  # whose patience is long: the first writes meanwhile
    return parts or []


def _is_images(samples: Tensor | np.ndarray) -> bool:
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def _of_images(part: _Part) -> _Part:
    if not _is_images(part[1]["samples"]):
        shape = list(part[1]["samples"].shape[1:])
        raise ConfigError(f"output: got one for pictures, but samples are {shape}: wants FILE.npz")
    return part


def _joined(n: int, parts: Iterable[_Part]) -> dict[str, Any]:
    """Arrays [n, *] of all parts, which come in any order."""
    whole: dict[str, Any] = {}
    for first, arrays in parts:
        for name, array in arrays.items():
            if name not in whole:
                whole[name] = np.empty((n, *array.shape[1:]), array.dtype)
            whole[name][first : first + len(array)] = array
    return whole


def _write_folder(path: Path, n: int, parts: Iterable[_Part]) -> None:
    from PIL import Image

    digits = max(6, len(str(n - 1)))
    with files.folder(path.resolve()) as folder, ThreadPoolExecutor() as threads:

        def save(i: int, image: np.ndarray) -> None:
            pixels = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
            Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{i:0{digits}}.png")

        for first, arrays in map(_of_images, parts):
            images = arrays["samples"]
            list(threads.map(save, range(first, first + len(images)), images))
