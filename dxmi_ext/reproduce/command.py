"""`dxmi reproduce`: reproduces the paper's tables, row by row and seed by seed.

Every (row, seed) is a unit (`units`) with a small json file. A unit that exists, here or in another
experiment, is not run again. Modules such as `table1` define the experiments, `workers` and `computing` run
the units, and `table` writes the page and the figures. Imports ``dxmi_ext`` up to the tasks.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dxmi_ext import tasks
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.settings import Settings, setting
from dxmi_ext.engine.storage import files, folders
from dxmi_ext.reproduce import preparation, table, units, workers
from dxmi_ext.reproduce.ablations import ABLATIONS, MCMC
from dxmi_ext.reproduce.energies import ENERGIES
from dxmi_ext.reproduce.experiments import Experiment, Row
from dxmi_ext.reproduce.fashion_mnist import FASHION_MNIST
from dxmi_ext.reproduce.lengths import LENGTHS
from dxmi_ext.reproduce.magnetic_tiles import MAGNETIC_TILES
from dxmi_ext.reproduce.many_classes import ANOMALY
from dxmi_ext.reproduce.surfaces import SURFACES
from dxmi_ext.reproduce.table1 import DDPM, DENSITIES, TABLE1
from dxmi_ext.reproduce.temperature import REFINEMENTS, TEMPERATURE
from dxmi_ext.reproduce.units import Unit
from dxmi_ext.two_d import recipe as two_d

_IN_2D = (TABLE1, DDPM, DENSITIES, ABLATIONS, MCMC, TEMPERATURE, REFINEMENTS, LENGTHS)
_OTHERS = (MAGNETIC_TILES, FASHION_MNIST, ENERGIES, ANOMALY, SURFACES)
EXPERIMENTS = {experiment.name: experiment for experiment in (*_IN_2D, *_OTHERS)}
_DATA = "data"  # folder for data that an experiment prepares
_RESULTS: files.Tree = {r"(?s).+-seed\d+\.json": None, table.PAGE: None, r"[\w-]+\.png|gains\.json": None}


class Incomplete(UserError):
    """Some units failed; the others are done."""


@dataclasses.dataclass
class ReproduceSettings(Settings):
    """Settings of the command ``reproduce``."""

    seeds: int | None = setting(
        None,
        "number of runs of each row, with seeds 0, 1, ..., at most 1 of a row that the experiment runs once; "
        "null: the experiment's, or 1 with quick",
        minimum=1,
        maximum=1000,
    )
    rows: str | None = setting(None, "rows or sweeps to run, names separated by commas; null: all rows")
    workers: int = setting(
        0,
        "number of runs at a time, each a process with one thread; 0: one for each core",
        minimum=0,
        maximum=256,
    )
    quick: bool = setting(False, "runs with a tenth of the iterations, in a separate folder; also --quick")
    output: str | None = setting(
        None,
        "folder of the table and its units; null: docs/results/EXPERIMENT, or runs/quick/EXPERIMENT with "
        "quick",
        path=True,
    )
    work: str | None = setting(
        None, "folder of the runs themselves; null: runs/reproduce/EXPERIMENT", path=True
    )
    data: str | None = setting(None, "path of the data; null: the recipes' paths", path=True)
    device: str = setting("cpu", "cpu, cuda or cuda:N", pattern=r"cpu|cuda(:\d+)?")


def find(name: str) -> Experiment:
    """The experiment with a name.

    Raises:
        config.ConfigError: there is no such experiment.
    """
    if name not in EXPERIMENTS:
        hint = config.did_you_mean(name, EXPERIMENTS)
        raise config.ConfigError(f"experiment must be one of {', '.join(EXPERIMENTS)}, got {name!r}{hint}")
    return EXPERIMENTS[name]


def describe(name: str | None = None) -> str:
    """The experiments, or the rows of one, and the settings."""
    if name is None:
        lines = [(e.name, f"{e.title}; {len(_run_rows(e))} rows") for e in EXPERIMENTS.values()]
        heading = "experiments"
    else:
        lines = [(row.name, row.label) for row in _run_rows(find(name))]
        lines += [(sweep, f"sweep of {', '.join(rows)}") for sweep, rows in find(name).sweeps.items()]
        heading = f"rows of {name}"
    width = max(len(left) for left, _ in lines)
    listed = "\n".join(f"  {left:<{width}}  {right}" for left, right in lines)
    return f"{heading}:\n{listed}\n\n{config.describe(ReproduceSettings())}"


def run(experiment: Experiment, cfg: ReproduceSettings) -> None:
    """Runs the missing units of an experiment, then writes its README.md and figures from all units.

    Raises:
        config.ConfigError: a row is unknown.
        folders.FolderError: a folder holds something else.
        files.Locked: another process is running in the same folder.
        Incomplete: some units failed.
        signals.Stopped: on SIGTERM or Ctrl-C; running units are saved and resume with the next call.
    """
    output = Path(cfg.output or f"{'runs/quick' if cfg.quick else 'docs/results'}/{experiment.name}")
    work = Path(cfg.work or f"runs/reproduce/{experiment.name}")
    seeds = cfg.seeds or (1 if cfg.quick else experiment.seeds)
    names = _names(experiment, cfg.rows)
    kinds = [tasks.task_of(tasks.find(row.recipe)) for row in experiment.rows]
    if cfg.data is not None and any(kind is two_d or "data" not in kind.Config.of().flat() for kind in kinds):
        raise config.ConfigError(
            f"data must not be given for {experiment.name}, whose rows define their densities, "
            f"got {cfg.data!r}"
        )
    source = preparation.source_of(cfg.data, work / _DATA)

    def unit_of(row: Row, seed: int) -> Unit:
        made = experiment.prepare is not None and str(work / _DATA / str(row.settings["data"]))
        return Unit(row, seed, cfg.quick, output, work, cfg.device, made or cfg.data, source)

    folders.check(work, "work", units.is_work, key="work")
    if output.resolve() != work.resolve():
        folders.check(
            output, "results", lambda path: units.are_results(path) or table.is_page(path / table.PAGE)
        )
    folders.check_file(output / table.PAGE, table.is_page, "the page of an experiment")
    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    with files.lock(work / ".lock"):
        folders.mark(work, "work")
        files.tidy(output, _RESULTS)
        before = _finished(unit_of, experiment, output)  # units of the wrong kind are an error
        if cfg.data is not None and any(units.source_of(found) is None for _, found in before):
            runlog.note(f"{output} has units without a digest of their data, assumed to be of {cfg.data}")
        # Seed by seed, so that a table that is stopped early has units of every row.
        rows = [row for row in experiment.rows if row.name in names]
        chosen = [
            unit_of(row, seed)
            for seed in range(seeds)
            for row in rows
            if row.seeds is None or seed < row.seeds
        ]
        missing = [unit for unit in chosen if not (_is_done(unit) or _is_elsewhere(unit, experiment))]
        print(f"{experiment.name}: {len(chosen)} units, {len(chosen) - len(missing)} done")
        if cfg.output is None and not (before or cfg.quick):
            runlog.note(
                f"{output} has no results, so all are computed; those of the repository are in its checkout"
            )
        missing = _with_starts(missing)
        if missing:
            preparation.prepare(experiment, cfg.data, source, work / _DATA)
        try:
            failures = workers.run(missing, cfg.workers or workers.cores())
        finally:
            finished = _finished(unit_of, experiment, output)
            _publish(experiment, finished, output, quick=cfg.quick, draws=bool(missing))
    if failures:
        raise Incomplete(f"{len(failures)} of {len(missing)} runs failed:\n" + "\n".join(failures))


def _run_rows(experiment: Experiment) -> list[Row]:
    """The rows with runs of their own, without those whose numbers are in the runs of another."""
    return [row for row in experiment.rows if row.of is None]


def _names(experiment: Experiment, given: str | None) -> list[str]:
    known = [row.name for row in _run_rows(experiment)]
    if given is None:
        return known
    names = [row for name in given.split(",") for row in experiment.sweeps.get(name, (name,))]
    known += experiment.sweeps
    for name in names:
        if name not in known:
            hint = config.did_you_mean(name, known) or f"; known: {', '.join(known)}"
            raise config.ConfigError(f"rows must be names of rows or sweeps, got {name!r}{hint}")
    return names


def _is_done(unit: Unit) -> bool:
    """Whether a unit has a usable json; prints the reason if it has an unusable one."""
    try:
        return units.read(unit) is not None
    except units.UnusableUnit as error:
        runlog.note(f"{error}; it is run again")
        return False


def _is_elsewhere(unit: Unit, experiment: Experiment) -> bool:
    """Whether another experiment has the same run, whose numbers are then copied. Only in 2D, where settings
    determine the data, and only if the figures need no network."""
    if unit.task is not two_d or unit.row.may_diverge or not experiment.sweeps:
        return False
    path = units.adopt(unit, experiment.columns.keys() - {"diverged"})
    if path is not None:
        runlog.note(f"{unit.name}: copied from the same run in {path}")
    return path is not None


def _with_starts(missing: Sequence[Unit]) -> list[Unit]:
    """The units, each after the unit that it starts from if that has not been run."""
    ordered: dict[str, Unit] = {}
    for unit in missing:
        if unit.start is not None and not unit.start.is_here():
            ordered.setdefault(unit.start.name, unit.start)
        ordered.setdefault(unit.name, unit)
    return list(ordered.values())


def _finished(
    unit_of: Callable[[Row, int], Unit], experiment: Experiment, output: Path
) -> list[tuple[Unit, dict[str, Any]]]:
    """The units that have a usable json in a folder, and the json, row by row, with any seed.

    Raises:
        UserError: the folder holds quick units and these are not, or the reverse.
    """
    found = []
    for row in experiment.rows:
        matches = [re.fullmatch(rf"{re.escape(row.name)}-seed(\d+)\.json", p.name) for p in output.iterdir()]
        for seed in sorted(int(match[1]) for match in matches if match):
            unit = unit_of(row, seed)
            try:
                numbers = units.read(unit)
            except units.UnusableUnit:  # reported where the unit is requested
                continue
            if numbers is not None:
                found.append((unit, numbers))
    return found


def _publish(
    experiment: Experiment,
    finished: Sequence[tuple[Unit, dict[str, Any]]],
    output: Path,
    *,
    quick: bool,
    draws: bool,
) -> None:
    """Writes README.md; draws the figures if requested or missing."""
    done = [unit for unit, _ in finished]
    found: dict[str, list[Any]] = {}
    for unit, numbers in finished:
        found.setdefault(unit.row.name, []).append(numbers)
    try:
        pictures = _draw(experiment, found, done, output, draws=draws)
    except ModuleNotFoundError as error:
        runlog.note(f"no figures: {error.name} is not installed; pip install {error.name}")
        pictures = []
    summary = "" if experiment.summary is None else experiment.summary(done, output)
    figures = [picture.name for picture in pictures]
    text = table.markdown(experiment, found, quick=quick, figures=figures, summary=summary)
    files.write_text(output / table.PAGE, text)
    print("\n".join(line for line in text.splitlines() if line.startswith("|")))
    print(f"{output}: README.md from {len(done)} units")


def _draw(
    experiment: Experiment, found: table.Found, done: Sequence[Unit], output: Path, *, draws: bool
) -> list[Path]:
    """Draws an experiment's sweeps, which need only numbers, and its runs, which need their networks."""
    pictures = table.sweeps(output, experiment, found)
    if experiment.summary is not None:  # it shows everything
        return pictures
    if experiment.shown:
        done = [unit for unit in done if unit.row.name in experiment.shown]
    if not done or (experiment.sweeps and not experiment.shown):
        return pictures
    picture = output / f"{experiment.name}.png"
    try:
        if (draws or not picture.exists()) and (absent := table.figure(picture, experiment, done)):
            runlog.note(
                f"{picture}: the networks or pictures of {', '.join(absent)} are not in {done[0].work}"
            )
    except UserError as error:  # networks of another version, or damaged
        runlog.note(f"no figure: {error}")
    return [*pictures, picture] if picture.is_file() else pictures
