"""What an experiment of ``dxmi reproduce`` is: rows of settings, columns of numbers, the paper's beside them.

To add one, define an `Experiment` in a module of this package and add it to ``command.EXPERIMENTS``. Imports
the standard library alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Published = Mapping[str, tuple[float, float | None]]
"""The paper's numbers by name: mean, and deviation where it tells one."""

COLUMNS = {"sliced_wasserstein": "SW", "auroc": "AUROC", "energy_kl": "KL"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: settings that are run with several seeds."""

    name: str
    """In file names."""
    label: str
    """In the table and the figure."""
    settings: Mapping[str, Any]
    """Over those of the recipe."""
    paper: Published = dataclasses.field(default_factory=dict)
    recipe: str = "8gaussians"
    start: Row | None = None
    """Whose network, of the same seed, this one starts from."""
    chain: str | None = None
    """Nothing is trained: the network of ``start``, or of the recipe's own start, is evaluated by this chain,
    as by `dxmi evaluate chain=`."""
    of: str | None = None
    """Name of the row whose runs have this one's numbers too."""
    prefix: str = ""
    """Of their names there."""
    seeds: int | None = None
    """Runs of it, where fewer than the experiment's say enough; None: as many."""
    may_diverge: bool = False
    """A run that does not stay finite is a result: ``diverged`` is 1, or 0 where it does."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table."""

    name: str
    title: str
    rows: Sequence[Row]
    columns: Mapping[str, str] = dataclasses.field(default_factory=lambda: COLUMNS)
    """Number of a run -> heading."""
    notes: str = ""
    """What a reader of the table must know."""
    seeds: int = 5
    """Runs of each row, where nothing else is asked for."""
    sweeps: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """What is changed -> the rows that differ in it, in order. It has a picture, and ``rows=`` takes it."""
    shown: Sequence[str] = ()
    """Rows whose runs a picture shows; none: all, where there are no sweeps."""
    prepare: Callable[[str | None, Path], None] | None = None
    """Makes the rows' data, which their settings name, of the setting ``data`` in a folder."""
    summary: Callable[[Sequence[Any], Path], str] | None = None
    """What the page says of all units together; it gets those that are done, and the page's folder."""
