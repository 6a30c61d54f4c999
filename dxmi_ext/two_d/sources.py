"""The data of a 2D run: a known density, or the points of a file.

Points of a file are standardized to the standard deviation of the 8 Gaussians, for which the recipes' noise
levels are made. Every tenth point is held out for the metrics. Imports torch, numpy and
``two_d.densities``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.runs.identity import Fingerprints, fingerprint
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import tables
from dxmi_ext.engine.storage.files import UNREADABLE
from dxmi_ext.method import noise
from dxmi_ext.two_d import densities

_STD = 2.0  # standard deviation of standardized coordinates
_SAMPLED = 10_000  # points per sampling of the metrics
_HELD_OUT = 10  # every tenth point
_FEWEST = 100  # points of a file
_LEAST = 1e-12  # standard deviation, relative to the mean, that float64 resolves


class Units(NamedTuple):
    """The units of a file's points: x = center + scale * z, z standardized."""

    center: list[float]
    scale: list[float]

    def restore(self, z: Tensor) -> Tensor:
        """Standardized points [*, 2] in the units of the file, float64."""
        center, scale = torch.tensor([self.center, self.scale], dtype=torch.float64, device=z.device)
        return center + scale * z


@dataclasses.dataclass
class Source:
    """Data of a run, whose points are standardized if they are those of a file."""

    name: str
    """One of ``densities.DENSITIES``, or a path."""
    train: Tensor | None = None
    """float32 [n, 2]; None for a density."""
    held_out: Tensor | None = None
    """float32 [m, 2]"""
    units: Units | None = None
    box: Tensor = densities.BOX
    """Lower and upper corner of the data, float32 [2, 2]."""
    fingerprints: Fingerprints = dataclasses.field(default_factory=dict)

    def sample(self, n: int, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        """Training data [n, 2], drawn with replacement from the points of a file; see `densities.sample`."""
        if self.train is None:
            return densities.sample(self.name, n, key, sample_offset=sample_offset)
        return self.train[noise.randint(len(self.train), n, key, sample_offset=sample_offset)]

    def tested(self, n: int, key: Tensor, *, trained: bool = False) -> Tensor:
        """Fresh data [n, 2] from a density, or distinct held-out points of a file.

        Args:
            n: number of points, at most that of ``sampling``.
            trained: whether to draw training points of the file instead.
        """
        points = self.train if trained else self.held_out
        if points is None:
            return densities.sample(self.name, n, key)
        return points[noise.uniform((len(points),), key).argsort()[:n]]

    @property
    def sampling(self) -> dict[str, Any]:
        """Arguments of `metrics.evaluate` for a file: as many points as are held out, and the box of all."""
        if self.train is None or self.held_out is None:
            return {}
        return {"n": min(_SAMPLED, len(self.held_out)), "box": self.box.tolist()}

    def restored(self, z: Tensor) -> Tensor:
        """Points [*, 2] in the units of the data."""
        return z if self.units is None else self.units.restore(z)

    def described(self) -> str:
        """A line about the points of a file."""
        assert self.train is not None and self.held_out is not None and self.units is not None
        center, scale = (", ".join(f"{x:.4g}" for x in each) for each in self.units)
        return (
            f"{self.name}: {len(self.train):,} points for training, {len(self.held_out):,} held out; "
            f"standardized to z = (x - [{center}]) / [{scale}], which networks and metrics see"
        )

    def details(self) -> dict[str, Any]:
        """An overview of the points of a file for `dxmi data`, as JSON."""
        assert self.train is not None and self.held_out is not None
        low, high = self.restored(self.box).tolist()
        ranges = {
            axis: [float(f"{end:.6g}") for end in ends] for axis, *ends in zip("xy", low, high, strict=True)
        }
        splits = {"train": {"points": len(self.train)}, "held out": {"points": len(self.held_out)}}
        about = {"path": str(Path(self.name).resolve()), "layout": "points", "splits": splits}
        return about | {"masks": 0, "skipped": [], "ranges": ranges}


def is_file(name: str) -> bool:
    return name not in densities.DENSITIES


def of(name: str, device: torch.device | str = "cpu") -> Source:
    """The source of a density, or of the points [N, 2] in a .npy or .csv file.

    Raises:
        ConfigError: the file cannot be read, or its points are too few, not finite or all alike.
    """
    if not is_file(name):
        return Source(name)
    x = _read(Path(name))
    held = np.arange(len(x)) % _HELD_OUT == 0
    with np.errstate(over="ignore", invalid="ignore"):  # rejected below
        center, spread = x[~held].mean(axis=0), x[~held].std(axis=0)
    if not (np.isfinite(spread) & (spread > _LEAST * np.abs(center))).all():
        raise ConfigError(
            f"data: {name}: columns must vary by > {_LEAST:g} of their mean and be of magnitude < 1e150, got "
            f"standard deviations {spread} and means {center}"
        )
    scale = spread / _STD
    z = torch.from_numpy(((x - center) / scale).astype(np.float32)).to(device)
    prints = {"train": fingerprint(x[~held]), "test": fingerprint(x[held])}
    mask = torch.from_numpy(held)
    units, box = Units(center.tolist(), scale.tolist()), torch.stack((z.amin(0), z.amax(0)))
    return Source(name, z[~mask], z[mask], units, box, prints)


def _read(path: Path) -> np.ndarray:
    """float64 [N, 2]"""
    try:
        x = tables.read_csv(path) if path.suffix.lower() == ".csv" else _read_npy(path)
    except tables.TableError as error:
        raise ConfigError(f"data: {path}: {error}") from error
    except UNREADABLE as error:
        why = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise ConfigError(f"data: {path} {why}") from error
    if x.dtype.kind not in "fiu" or x.ndim != 2 or x.shape[1] != 2:
        raise ConfigError(
            f"data: {path} must hold numbers [N, 2], got {x.dtype} {list(x.shape)}; for data of other shapes "
            "see docs/tutorials/own_data.py"
        )
    if len(x) < _FEWEST:
        raise ConfigError(f"data: {path} must have >= {_FEWEST} points, got {len(x)}")
    x = x.astype(np.float64)
    if len(bad := np.argwhere(~np.isfinite(x))):
        row, column = bad[0].tolist()
        raise ConfigError(
            f"data: {path} must be finite, got {x[row, column]} in row {row}, column {column} (from 0)"
        )
    return x


def _read_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # unlike numpy.load, this takes no other format for a pickle
        return np.lib.format.read_array(file, allow_pickle=False)
