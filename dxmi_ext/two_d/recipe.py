"""2D recipes: DDPM pretraining, DxMI, then plots and a row of the paper's Table 1.

Imports torch and ``dxmi_ext``; scikit-learn and matplotlib where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dxmi_ext.engine import course
from dxmi_ext.engine.compute import execution
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.course import Finish
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.runs.identity import Fingerprints, changed, data_of
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.method import generate, noise
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.denoising import Pretrainer, uniform_levels
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d import likelihood, model, plots, sources
from dxmi_ext.two_d.evaluation import draw_pictures, evaluate_networks, samples_of, table
from dxmi_ext.two_d.model import SIGMA_DATA, build, draw, load
from dxmi_ext.two_d.settings import Config, EvaluateSettings
from dxmi_ext.two_d.sources import Source

SAMPLES = "points"
"""What samples are."""
_NEEDS = {"sklearn": "entropy_excess and coverage", "matplotlib": "pictures"}


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe and returns the summary, on the first rank."""
    run = Run(cfg, ranks, _fingerprints(cfg))

    def learn() -> Finish:
        data = _data(run, cfg)
        networks, schedule = build(cfg, run.device)
        run.describe(networks)
        if run.ranks.first:
            final.announce_missing(_NEEDS)
        if cfg.run.pretrained and cfg.algorithm.trains_sampler:
            _pretrain(run, cfg, data, networks, schedule)
        phase, trainer = _trainer(run, cfg, networks)
        picture = _picture(cfg, data, trainer.averaged, trained=True)
        run.phase(phase, trainer, cfg.run.iterations, _batches(cfg, data, "dxmi", run), picture)
        averaged = run.ranks.whole(trainer.averaged)
        return lambda: _finish(run, cfg, data, trainer, averaged)

    return course.train(run, learn, "pictures", cfg.execution)


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the pretraining alone; training with the same output continues from it."""
    if not cfg.run.pretrained:
        raise ConfigError("pretrained must be true for pretraining alone, got false")
    if not cfg.algorithm.trains_sampler:
        raise ConfigError(
            f"negatives must be sampler or refined for pretraining alone, got {cfg.algorithm.negatives}"
        )
    run = Run(cfg, ranks, _fingerprints(cfg))

    def learn() -> Callable[[], None]:
        data = _data(run, cfg)
        networks, schedule = build(cfg, run.device)
        run.describe(networks)
        _pretrain(run, cfg, data, networks, schedule)
        whole = run.ranks.whole(networks)
        return lambda: model.save(run.directory / "model", whole, data.units)

    text = "pretrained; `dxmi train` with output={directory} continues from here"
    course.pretrain(run, learn, text, cfg.execution)


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[Batch]:
    """Samples [m, 2] of a run's final sampler, or of Langevin chains if it trained none; see
    `generate.batches`. Those of a run on a file's points are in its units."""
    cfg, networks = load(directory, device)
    chains = None if cfg.algorithm.trains_sampler else model.chains(cfg)
    drawn = generate.batches(networks, rows, seed, batch_size=batch_size, chains=chains, **options)
    if (units := model.units_of(directory)) is None:
        return drawn
    return (Batch(units.restore(batch.samples), batch.labels) for batch in drawn)


def evaluate(directory: Path, settings: EvaluateSettings, device: torch.device) -> tuple[dict[str, Any], str]:
    """The metrics of a run's final networks and their table, for a given seed of noise and data.

    Raises:
        ConfigError: the data are not those of the run.
    """
    cfg, networks = load(directory, device)
    if settings.data is not None:
        cfg = _with_file(cfg, settings.data, directory)
    path, known = cfg.density.data, data_of(directory)
    if sources.is_file(path) and not Path(path).exists():
        raise ConfigError(f"data: {path} does not exist; data=FILE names another place")
    if settings.data is not None and not known:
        runlog.note(f"{directory} has no fingerprint of its data; {path} is assumed to hold them")
    if changed(known, sources.of(path).fingerprints):
        raise ConfigError(
            f"data: {path} must hold the points that {directory} was trained on, but has another "
            "fingerprint; data=FILE names another place"
        )
    _, about = checkpoint.load_model_state(directory / "model")
    cfg.evaluation.samplings = settings.samplings or cfg.evaluation.samplings
    options = {"seed": settings.seed, "tau_factor": about.get("tau_factor", 1.0)}
    density: dict[str, Any] = {}
    if settings.log_partition:  # first, since it may be refused
        density = likelihood.evaluate(cfg, networks, paths=settings.paths, **options)
    numbers = evaluate_networks(cfg, networks, **options)
    lines = [table(cfg, numbers), *([likelihood.table(density)] if density else [])]
    return numbers | density, "\n".join(lines)


def _with_file(cfg: Config, file: str, directory: Path) -> Config:
    """The settings of a run on points of a file, with another place for it.

    Raises:
        ConfigError: the run has a density instead, or this is not the name of a file.
    """
    if not sources.is_file(cfg.density.data):
        raise ConfigError(f"data must be null, as {directory} was trained on {cfg.density.data}, got {file}")
    moved = cfg.replace(data=file)
    if not sources.is_file(moved.density.data):
        raise ConfigError(f"data must be the file that {directory} was trained on, got {file}")
    return moved


def read(cfg: Config) -> Source:
    """The points of the settings' file.

    Raises:
        ConfigError: the data are not a file, or it cannot be read.
    """
    if not sources.is_file(cfg.density.data):
        raise ConfigError(f"data must be a file of points, got the density {cfg.density.data}")
    return sources.of(cfg.density.data)


def _finish(
    run: Run, cfg: Config, data: Source, trainer: DxMITrainer | LangevinTrainer, averaged: Networks
) -> tuple[dict[str, Any], str]:
    """Saves and evaluates the averaged networks."""
    tau_factor = trainer.costs.tau_factor if isinstance(trainer, DxMITrainer) else 1.0
    model.save(run.directory / "model", averaged, data.units, tau_factor)
    numbers = evaluate_networks(cfg, averaged, seed=cfg.run.seed, tau_factor=tau_factor)
    final.attempt("pictures", lambda: draw_pictures(run.directory, cfg, averaged))
    return {"samples": samples_of(cfg), **numbers}, table(cfg, numbers)


def _fingerprints(cfg: Config) -> Callable[[str], Fingerprints] | None:
    """path -> fingerprints of the points there, if the data are a file."""
    return (lambda path: sources.of(path).fingerprints) if sources.is_file(cfg.density.data) else None


def _data(run: Run, cfg: Config) -> Source:
    data = sources.of(cfg.density.data, run.device)
    if data.units is not None and run.ranks.first:
        print(data.described())
    return data


def _pretrain(run: Run, cfg: Config, data: Source, networks: Networks, schedule: Schedule) -> None:
    execution.prepare(cfg.execution, networks.sampler.network, data_shape=(2,))
    pretrainer = Pretrainer(
        networks.sampler.network,
        uniform_levels(schedule.signal, schedule.noise),
        prediction="edm" if cfg.chain.schedule == "edm" else "eps",
        sigma_data=SIGMA_DATA,
        lr=cfg.pretraining.pretrain_lr,
        iterations=cfg.run.pretrain_iterations,
        seed=cfg.run.seed,
        ranks=run.ranks,
        execution=cfg.execution,
    )
    batch, picture = _batches(cfg, data, "pretrain", run), _picture(cfg, data, networks)
    run.phase("pretrain", pretrainer, cfg.run.pretrain_iterations, batch, picture)


def _trainer(run: Run, cfg: Config, networks: Networks) -> tuple[str, DxMITrainer | LangevinTrainer]:
    """The phase after pretraining, and its trainer."""
    options: dict[str, Any] = {"iterations": cfg.run.iterations, "seed": cfg.run.seed, "ranks": run.ranks}
    options |= {"langevin": cfg.langevin, "execution": cfg.execution}
    if cfg.algorithm.trains_sampler:
        return "dxmi", DxMITrainer(networks, cfg.algorithm, **options)
    return "langevin", LangevinTrainer(networks, cfg.algorithm, **options)


def _picture(
    cfg: Config, data: Source, networks: Networks, *, trained: bool = False
) -> Callable[[IO[bytes]], None] | None:
    """Draws samples of fixed noise, in the data's units: over the energy, or beside data before it is
    trained."""
    if cfg.run.shard:  # the first rank has only its shard
        return None
    device = networks.sampler.log_std.device
    keys = noise.Draws(cfg.run.seed, "pictures", ["sample", "data"], device).at(0)
    box = data.restored(data.box)

    def picture(file: IO[bytes]) -> None:
        if trained:
            samples = data.restored(draw(cfg, networks, 2000, keys["sample"]))
            energies = torch.no_grad()(networks.energy)(plots.grid(box=data.box).to(device))
            plots.energy(file, energies, samples, title="samples over the energy", box=box)
        else:
            samples = data.restored(networks.sampler.sample(2000, keys["sample"]))
            plots.samples(file, data.restored(data.sample(2000, keys["data"])), samples, box=box)

    return picture


def _batches(cfg: Config, data: Source, phase: str, run: Run) -> Callable[[int], Tensor]:
    """iteration -> this rank's rows of the data."""
    draws = noise.Draws(cfg.run.seed, f"data of {phase}", ["data"], run.device)
    count, offset = run.rows
    return lambda iteration: data.sample(count, draws.at(iteration)["data"], sample_offset=offset)
