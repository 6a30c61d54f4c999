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
"""The paper's numbers by name: mean, and standard deviation if it is given."""

COLUMNS = {"sliced_wasserstein": "SW", "auroc": "AUROC", "energy_kl": "KL"}


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table: settings that are run with several seeds."""

    name: str
    """Name in file names."""
    label: str
    """Name in the table and the figures."""
    settings: Mapping[str, Any]
    """Settings that override the recipe's."""
    paper: Published = dataclasses.field(default_factory=dict)
    recipe: str = "8gaussians"
    start: Row | None = None
    """Row whose network, with the same seed, this one starts from."""
    chain: str | None = None
    """Chain that evaluates the network of ``start``, or of the recipe's own start, without training, as
    `dxmi evaluate chain=` does."""
    of: str | None = None
    """Name of the row whose runs also have the numbers of this one."""
    prefix: str = ""
    """Prefix of this row's numbers in those runs."""
    seeds: int | None = None
    """Number of runs; None: the experiment's."""
    may_diverge: bool = False
    """Whether a run that becomes non-finite is a result; its number ``diverged`` is then 1, otherwise 0."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A table."""

    name: str
    title: str
    rows: Sequence[Row]
    columns: Mapping[str, str] = dataclasses.field(default_factory=lambda: COLUMNS)
    """Name of a number -> heading."""
    notes: str = ""
    """Explanation of the table."""
    seeds: int = 5
    """Default number of runs of each row."""
    sweeps: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    """Name of a sweep -> its rows, in order. A sweep has a figure, and can be selected by ``rows=``."""
    shown: Sequence[str] = ()
    """Rows whose runs are shown in a figure; by default all if there are no sweeps."""
    prepare: Callable[[str | None, Path], None] | None = None
    """Writes the data of the rows to an empty folder, from the setting ``data``."""
    prepared: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What the prepared data depend on besides ``data``; data prepared with other values are replaced."""
    summary: Callable[[Sequence[Any], Path], str] | None = None
    """Text about all units, from the finished ones and the folder of the page."""


def markdown_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown whose columns, except the first, are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))
