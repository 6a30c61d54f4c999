"""Files of samples that the command ``sample`` writes: arrays, images or a grid.

Every rank draws its rows; the first rank writes. Imports torch, numpy and the engine; Pillow where images are
written.
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.output import plots, runlog
from dxmi_ext.engine.output.plots import to_uint8
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import files, folders


class Batch(NamedTuple):
    """Consecutive rows."""

    samples: Tensor
    """[m, *]"""
    labels: Tensor | None
    """int64 [m], or None without classes."""


def rows_of(n: int, ranks: Ranks) -> range:
    """A rank's rows of n; the same number on each, so the last may exceed n, which `write` drops."""
    count = math.ceil(n / ranks.world_size)
    return range(ranks.rank * count, (ranks.rank + 1) * count)


def check_output(output: str, kind: str = "images") -> None:
    """Checks that `write` can write the output, before anything is drawn.

    Args:
        kind: kind of the samples; only images may be written as pictures.

    Raises:
        ConfigError: the name has none of the supported forms, or one for images of samples of another kind.
        FolderError: the path exists and was not written by `write`.
    """
    path = Path(output)
    if kind != "images" and (output.endswith("/") or path.suffix == ".png"):
        raise ConfigError(f"output must be FILE.npz: the run has {kind}, not images, got {output!r}")
    if output.endswith("/"):
        folders.check_new(path)
    elif path.suffix == ".npz":
        folders.check_file(path, folders.is_samples, "one of samples")
    elif path.suffix == ".png":
        folders.check_file(path, folders.is_picture, "a grid of samples")
    else:
        raise ConfigError(f"output must be FILE.npz, FILE.png or FOLDER/, got {output!r}")


def write(output: str, n: int, drawn: Iterable[Batch], ranks: Ranks | None = None) -> str:
    """Writes samples atomically, in the format given by the output's name.

    Samples [m, C, H, W] with C 1 or 3 are images, saved as uint8. ``FILE.npz`` holds "samples" [n, *], and
    "labels" int64 [n] if there are classes; ``FOLDER/`` one image per file, 000000.png and so on;
    ``FILE.png`` a grid of all.

    Args:
        output: path accepted by `check_output`.
        n: number of samples of all ranks.
        drawn: batches of this rank's `rows_of`.
        ranks: ranks, all of which call this; the first writes.

    Returns:
        A description of what was written; empty on other ranks than the first.

    Raises:
        ConfigError: the output is for images, but the samples are not images.
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
    with files.file(path) as file:  # opened first, so that an error comes before hours of sampling
        if path.suffix == ".png":
            arrays = _joined(n, map(_of_images, parts))
            plots.images(file, torch.from_numpy(arrays["samples"]))
            return f"a grid of {n}"
        arrays = _joined(n, parts)
        np.savez(file, **arrays)
        with zipfile.ZipFile(file, "a") as archive:
            archive.comment = folders.ARCHIVE_COMMENT
    return ", ".join(f"{name} {list(array.shape)} {array.dtype}" for name, array in arrays.items())


_Part = tuple[int, dict[str, np.ndarray]]
"""The index of the first of some consecutive rows, and their arrays."""


def _gathered(drawn: Iterable[Batch], n: int, ranks: Ranks) -> Iterator[_Part]:
    """The parts of all ranks, on the first rank only, batch by batch."""
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
    """CPU tensors of the same shape from all ranks, on the first rank only."""
    if ranks.alone:
        return [rows]
    parts = [torch.empty_like(rows) for _ in range(ranks.world_size)] if ranks.first else None
    # This group has a long timeout, since the first rank writes meanwhile.
    dist.gather(rows, parts, group=ranks.control)
    return parts or []


def _is_images(samples: Tensor | np.ndarray) -> bool:
    return samples.ndim == 4 and samples.shape[1] in (1, 3)


def _of_images(part: _Part) -> _Part:
    if not _is_images(part[1]["samples"]):
        shape = list(part[1]["samples"].shape[1:])
        raise ConfigError(f"output must be FILE.npz unless samples are images, got samples {shape}")
    return part


def _joined(n: int, parts: Iterable[_Part]) -> dict[str, Any]:
    """Arrays [n, *] of all parts, in any order."""
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
