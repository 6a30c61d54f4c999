"""The table and the figure of an experiment, from its units alone.

Imports torch and ``dxmi_ext`` up to ``dxmi_ext.recipes``; matplotlib where used.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dxmi_ext import files, plots, recipes
from dxmi_ext.reproduce.experiments import Experiment
from dxmi_ext.reproduce.units import Unit

Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""The name of a row -> what its units came to, by seed."""


def markdown(experiment: Experiment, found: Found, *, quick: bool = False, figure: str | None = None) -> str:
    """A table: mean ± standard deviation over seeds of each number, the paper's beside it.

    Args:
        found: of rows that have no units yet there may be nothing.
        quick: they have a tenth of the iterations, as the page then says.
        figure: path of the picture, from the table's folder.
    """
    published = {key for row in experiment.rows for key in row.paper}
    heads = [""]
    for key, heading in experiment.columns.items():
        heads += [heading, "the paper"] if key in published else [heading]
    rows = []
    for row in experiment.rows:
        units = found.get(row.name, ())
        cells = [row.label]
        for key in experiment.columns:
            cells.append(_mean([unit["numbers"][key] for unit in units if key in unit["numbers"]]))
            if key in published:
                cells.append(_paper(row.paper.get(key)))
        rows.append([*cells, str(len(units))])
    every = [unit for row in experiment.rows for unit in found.get(row.name, ())]
    parts = [f"# {experiment.title}"]
    if quick:
        parts.append("**A tenth of the iterations: this shows that the experiment runs, and no result.**")
    floors = [unit["numbers"].get("sliced_wasserstein_floor") for unit in every]
    parts.append(_table([*heads, "seeds"], rows))
    notes = [
        "Mean ± standard deviation over seeds, of runs that differ in nothing else.",
        *([experiment.notes] if experiment.notes else []),
    ]
    if (floor := _mean([value for value in floors if value is not None])) != "":
        notes.append(f"Fresh data against data: SW {floor}.")
    parts += [*notes, *([f"![samples and energies]({figure})"] if figure else []), _machines(every)]
    option = " --quick" if quick else ""
    parts.append(f"Made by `dxmi reproduce {experiment.name}{option}`, from the json files beside it.")
    return "\n\n".join(part for part in parts if part) + "\n"


def figure(path: Path, experiment: Experiment, units: Sequence[Unit]) -> list[str]:
    """Samples above energies, a column for each row of 2D runs whose networks are here.

    Args:
        path: a picture that is there already stays, unless the networks of all rows are here.
        units: the finished ones; of each row, the first whose run has its networks is drawn.

    Returns:
        The names of finished rows whose networks are not here.
    """
    shown: dict[str, Unit] = {}
    finished = dict.fromkeys(unit.row.name for unit in units)
    for unit in units:
        if (unit.folder / "model").is_dir():
            shown.setdefault(unit.row.name, unit)
    absent = [name for name in finished if name not in shown]
    if not shown or (absent and path.exists()):
        return absent
    columns = []
    for row in experiment.rows:
        if row.name not in shown:
            continue
        unit = shown[row.name]
        task, cpu = recipes.task_of(recipes.find(row.recipe)), torch.device("cpu")
        cfg, networks = task.load(unit.folder, cpu)
        batches = task.sample(unit.folder, range(3000), cfg.seed, 3000, cpu)
        points = torch.cat([batch.samples for batch in batches])
        energies = torch.no_grad()(networks.energy)(plots.grid(120)) if cfg.iterations else None
        columns.append((row.label.replace(", ", "\n"), points, energies))
    with files.file(path) as file:
        plots.gallery(file, columns)
    return absent


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, rule, *rows))


def _mean(values: Sequence[float]) -> str:
    """Mean ± standard deviation, of a sample; nothing of no values."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _paper(published: tuple[float, float | None] | None) -> str:
    if published is None:
        return ""
    mean, deviation = published
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _machines(units: Sequence[Mapping[str, Any]]) -> str:
    """Where the units ran, with how long they took."""
    kinds: dict[str, list[float]] = {}
    for unit in units:
        threads = unit["machine"]["threads"]
        kind = f"{unit['machine']['processor']}, {threads} thread{'s' * (threads != 1)} a run"
        kind += "".join(f", {name} {unit['versions'].get(name)}" for name in ("torch", "dxmi_ext"))
        kinds.setdefault(kind, []).append(unit["seconds"])
    return "\n".join(
        f"- {len(seconds)} runs on {kind}; {min(seconds):.0f} to {max(seconds):.0f} s each"
        for kind, seconds in kinds.items()
    )
