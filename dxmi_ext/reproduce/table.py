"""The table and the figures of an experiment, from its units.

Imports torch and ``dxmi_ext`` up to the tasks; matplotlib where used.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dxmi_ext.anomaly import recipe as anomaly
from dxmi_ext.energies import recipe as energies
from dxmi_ext.engine.storage import files
from dxmi_ext.images import recipe as images
from dxmi_ext.reproduce import plots
from dxmi_ext.reproduce.experiments import Experiment, markdown_table
from dxmi_ext.reproduce.units import Unit
from dxmi_ext.two_d import recipe as two_d
from dxmi_ext.two_d.plots import grid

PAGE = "README.md"
_TITLE_WIDTH = 22  # characters
_MADE_BY = "Made by `dxmi reproduce "
Found = Mapping[str, Sequence[Mapping[str, Any]]]
"""Row name -> the json of its units, by seed."""
_DRAWN_FROM = {
    two_d: "model",
    images: "samples.png",
    energies: "samples.png",
    anomaly: "heatmaps.png",
}


def markdown(
    experiment: Experiment,
    found: Found,
    *,
    quick: bool = False,
    figures: Sequence[str] = (),
    summary: str = "",
) -> str:
    """The page: mean ± standard deviation over seeds of each number, beside the paper's.

    Args:
        found: the units; rows without units are named below the table.
        quick: whether units have a tenth of the iterations, which the page then says.
        figures: paths of figures, relative to the page's folder.
        summary: text before the table.
    """
    published = {key for row in experiment.rows for key in row.paper}
    heads = [""]
    for key, heading in experiment.columns.items():
        heads += [heading, "the paper"] if key in published else [heading]
    rows, absent = [], []
    for row in experiment.rows:
        units = found.get(row.of or row.name, ())
        if not units:
            absent.append(f"`{row.name}`")
            continue
        cells = [row.label]
        for key in experiment.columns:
            values = [unit["numbers"].get(row.prefix + key) for unit in units]
            cells.append(_mean([number for number in values if number is not None]))
            if key in published:
                cells.append(_paper(row.paper.get(key)))
        rows.append([*cells, str(len(units))])
    every = [unit for row in experiment.rows for unit in found.get(row.name, ())]
    parts = [f"# {experiment.title}"]
    if quick:
        parts.append(
            "**Runs with a tenth of the iterations, to show that the experiment works, not results.**"
        )
    parts += [*([summary] if summary else []), markdown_table([*heads, "seeds"], rows)]
    notes = [
        "Mean ± standard deviation over seeds; the runs of a row differ only in their seeds.",
        *([experiment.notes] if experiment.notes else []),
    ]
    if absent:
        notes.append(f"Rows without runs: {', '.join(absent)}.")
    if floors := _floors(experiment, found):
        notes.append(f"SW of fresh data: {floors}.")
    parts += [*notes, *(f"![{Path(figure).stem}]({figure})" for figure in figures), _machines(every)]
    option = " --quick" if quick else ""
    parts.append(f"{_MADE_BY}{experiment.name}{option}`, from the json files in this folder.")
    return "\n\n".join(part for part in parts if part) + "\n"


def is_page(path: Path) -> bool:
    """Whether a file is the page of an experiment."""
    return path.is_file() and f"\n{_MADE_BY}".encode() in path.read_bytes()


def sweeps(folder: Path, experiment: Experiment, found: Found) -> list[Path]:
    """Draws the figures of an experiment's sweeps that have units of at least two rows."""
    labels, pictures = {row.name: row.label for row in experiment.rows}, []
    for sweep, names in experiment.sweeps.items():
        if sum(name in found for name in names) < 2:
            continue
        panels = {
            heading: [
                [unit["numbers"][key] for unit in found.get(name, ()) if key in unit["numbers"]]
                for name in names
            ]
            for key, heading in experiment.columns.items()
        }
        panels = {heading: columns for heading, columns in panels.items() if any(columns)}
        pictures.append(folder / f"{experiment.name}-{sweep}.png")
        with files.file(pictures[-1]) as file:
            plots.sweep(file, [labels[name] for name in names], panels)
    return pictures


def figure(path: Path, experiment: Experiment, units: Sequence[Unit]) -> list[str]:
    """Draws a panel for each row with a run: samples above energies in 2D, else the run's own picture.

    Args:
        path: the figure; an existing one is replaced only if all rows have runs.
        units: finished units; the first of each row that has a run is drawn.

    Returns:
        The names of finished rows with nothing to draw.
    """
    shown: dict[str, Unit] = {}
    finished = dict.fromkeys(unit.row.name for unit in units)
    for unit in units:
        if _drawn_from(unit).exists():
            shown.setdefault(unit.row.name, unit)
    absent = [name for name in finished if name not in shown]
    if not shown or (absent and path.exists()):
        return absent
    drawn = [shown[row.name] for row in experiment.rows if row.name in shown]
    with files.file(path) as file:
        if drawn[0].task is two_d:
            plots.gallery(file, [_plane(unit) for unit in drawn])
        elif len(drawn) > 1:
            plots.grids(file, [(_title(unit), _drawn_from(unit)) for unit in drawn])
        else:
            file.write(_drawn_from(drawn[0]).read_bytes())
    return absent


def _drawn_from(unit: Unit) -> Path:
    """The networks of a 2D run, or the picture that a run of another task draws."""
    return unit.folder / _DRAWN_FROM[unit.task]


def _plane(unit: Unit) -> tuple[str, Tensor, Tensor | None]:
    """Title, samples and energies of a 2D run."""
    cpu = torch.device("cpu")
    cfg, networks = two_d.load(unit.folder, cpu)
    batches = two_d.sample(unit.folder, range(3000), cfg.run.seed, 3000, cpu)
    points = torch.cat([batch.samples for batch in batches])
    energies = torch.no_grad()(networks.energy)(grid(120)) if cfg.run.iterations else None
    return _title(unit), points, energies


def _title(unit: Unit) -> str:
    return textwrap.fill(unit.row.label, _TITLE_WIDTH)


def _floors(experiment: Experiment, found: Found) -> str:
    """The floors of each density over seeds; rows with the same seed have the same points."""
    key, floors = "sliced_wasserstein_floor", dict[str, dict[int, float]]()
    for row in experiment.rows:
        for unit in found.get(row.name, ()):
            if key in unit["numbers"]:
                floors.setdefault(unit["settings"]["data"], {})[unit["seed"]] = unit["numbers"][key]
    return ", ".join(f"{_mean([*by_seed.values()])} ({data})" for data, by_seed in floors.items())


def _mean(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; empty if there are no values."""
    if not values:
        return ""
    mean = statistics.fmean(values)
    form = ".3f" if abs(mean) < 10_000 else ",.0f"
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} ± {statistics.stdev(values):{form}}"


def _paper(published: tuple[float, float | None] | None) -> str:
    if published is None:
        return ""
    mean, deviation = published
    return f"{mean:.3f}" if deviation is None else f"{mean:.3f} ± {deviation:.3f}"


def _machines(units: Sequence[Mapping[str, Any]]) -> str:
    """The machines that the units ran on, and their times."""
    kinds: dict[str, list[float]] = {}
    for unit in units:
        threads = unit["machine"]["threads"]
        plural = "thread" if threads == 1 else "threads"
        kind = f"{unit['machine']['processor']}, {threads} {plural} per run"
        kind += "".join(f", {name} {unit['versions'].get(name)}" for name in ("torch", "dxmi_ext"))
        kinds.setdefault(kind, []).append(unit["seconds"])
    return "\n".join(
        f"- 1 run on {kind}; {times[0]:.0f} s"
        if len(times) == 1
        else f"- {len(times)} runs on {kind}; {min(times):.0f} to {max(times):.0f} s each"
        for kind, times in kinds.items()
    )
