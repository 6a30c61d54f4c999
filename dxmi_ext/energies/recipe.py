"""Recipes that train a sampler of a given energy, then estimate log Z.

Imports torch and ``dxmi_ext``; scipy and matplotlib where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies import annealing, metrics, model, plots, tempering
from dxmi_ext.energies.chains import Chain, GradientChain, PolicyChain
from dxmi_ext.energies.evaluation import evaluate_chain, samples_of, table
from dxmi_ext.energies.policy import PolicyTrainer
from dxmi_ext.energies.settings import Config, EvaluateSettings
from dxmi_ext.energies.targets import Target
from dxmi_ext.energies.vgs import GradientTrainer
from dxmi_ext.engine import course
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.course import Finish
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise

SAMPLES = "points"
"""What samples are."""
_NEEDS = {"scipy": "w2", "matplotlib": "pictures"}
_BATCH = 4096  # samples at a time
_ANNEALED = 2000  # particles
_FITTED = 4000  # paths that sigmas are fitted to


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to its end and returns the summary, on the first rank.

    Raises:
        ConfigError: the target cannot be loaded, or it differs from that of the run in the output folder.
    """
    target, source = model.target_of(cfg)
    if cfg.target.target_source not in (None, source):
        wanted = "null" if source is None else f"null or {source}"
        raise ConfigError(f"target_source must be {wanted}, got {cfg.target.target_source}")
    cfg.target.target_source = source
    run = Run(cfg, ranks)

    def learn() -> Finish:
        built = model.build(cfg, target, run.device)
        run.describe(built)
        if run.ranks.first:
            final.announce_missing(_NEEDS)
        trainer = _trainer(cfg, built, run)
        picture = _picture(cfg, target, trainer)
        run.phase(cfg.chain.sampler, trainer, cfg.run.iterations, _batches(target, run), picture)
        return lambda: _finish(run, cfg, target, trainer)

    return course.train(run, learn, "pictures")


def _finish(
    run: Run, cfg: Config, target: Target, trainer: PolicyTrainer | GradientTrainer
) -> tuple[dict[str, Any], str]:
    """Fits the sigmas of the trained chain, saves and evaluates it."""
    chain = trainer.chain
    before = chain.energy.count
    if cfg.chain.fit_stds:
        chain.fit_stds_(_FITTED, noise.Draws(cfg.run.seed, "sigmas", ["paths", "back"], run.device).at(0))
    trainer.evaluations += chain.energy.count - before
    model.save(run.directory / "model", chain)
    data = samples_of(cfg, target, cfg.run.seed, run.device)
    numbers = evaluate_chain(cfg, target, chain, data, seed=cfg.run.seed)
    shown = None if data is None else data[0]
    final.attempt("pictures", lambda: plots.draw(run.directory, cfg, target, chain, shown))
    numbers["evaluations"] = float(trainer.evaluations)
    return {**model.about(cfg), **numbers}, table(cfg, numbers)


def load(directory: Path, device: torch.device) -> tuple[Config, Chain]:
    """A run's settings and final chain; see `model.load`."""
    cfg, _, chain = model.load(directory, device)
    return cfg, chain


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    *,
    guidance: float = 0.0,
    labels: str | None = None,
    steps: int | None = None,
) -> Iterator[Batch]:
    """Samples [m, D] of a run's final sampler, batch after batch; row i depends on (seed, i) alone.

    Raises:
        ConfigError: guidance or labels are given, or steps differ from the run's.
    """
    cfg, _, chain = model.load(directory, device)
    for name, value in {"guidance": guidance or None, "labels": labels}.items():
        if value is not None:
            raise ConfigError(f"{name} must not be given for a sampler of an energy, got {value}")
    if steps not in (None, cfg.chain.steps):
        raise ConfigError(f"steps must be {cfg.chain.steps}, the run's own, got {steps}")
    key, size = ops.noise_key(seed, device=device), batch_size or _BATCH
    last_noise = cfg.evaluation.last_noise

    def drawn() -> Iterator[Batch]:  # so that errors are raised at the call
        for first in range(rows.start, rows.stop, size):
            count = min(size, rows.stop - first)
            yield Batch(chain.sample(count, key, last_noise=last_noise, sample_offset=first), None)

    return drawn()


def evaluate(
    directory: Path, settings: EvaluateSettings, device: torch.device
) -> tuple[dict[str, float | None], str]:
    """The metrics of a run's final sampler with noise of the given seed, and a table of them."""
    cfg, target, chain = model.load(directory, device)
    cfg.evaluation.paths = settings.paths or cfg.evaluation.paths
    cfg.evaluation.compared = settings.compared or cfg.evaluation.compared
    data = samples_of(cfg, target, settings.seed, device)
    weighs = settings.log_partition
    numbers = evaluate_chain(cfg, target, chain, data, seed=settings.seed, weighs=weighs)
    lines = [table(cfg, numbers), *_compare(cfg, target, settings, device, data, numbers)]
    return numbers, "\n".join(lines)


def _compare(
    cfg: Config,
    target: Target,
    settings: EvaluateSettings,
    device: torch.device,
    data: tuple[Tensor, Tensor] | None,
    numbers: dict[str, float | None],
) -> Iterator[str]:
    """A line for each method without a trained sampler that the settings ask for; adds to the numbers."""
    keys = noise.Draws(settings.seed, "annealing", ["all", "tempering"], device).at(0)
    temperature, std = cfg.target.temperature, float(model.levels_of(cfg).spread[0])
    if (levels := settings.annealing) is not None:
        found = final.numbers(
            "annealed importance sampling",
            lambda: annealing.annealed(target, temperature, std, keys["all"], n=_ANNEALED, levels=levels),
        )
        numbers |= found
        yield annealing.line(found, levels)
    if (sweeps := settings.tempering) is not None:
        found = final.numbers(
            "parallel tempering",
            lambda: _tempered(target, temperature, std, keys["tempering"], sweeps, data),
        )
        numbers |= found
        yield tempering.line(found, sweeps)


def _tempered(
    target: Target,
    temperature: float,
    std: float,
    key: Tensor,
    sweeps: int,
    data: tuple[Tensor, Tensor] | None,
) -> dict[str, float]:
    """The numbers of `tempering.tempered`, and of `metrics.compare` with samples of the target if there are
    any."""
    found, samples = tempering.tempered(target, temperature, std, key, sweeps=sweeps)
    if data is None:
        return found

    def compared() -> dict[str, float]:
        if len(samples) < (n := len(data[0])):
            raise ValueError(f"{sweeps} sweeps give {len(samples)} samples, fewer than compared={n}")
        numbers = metrics.compare(samples[:n], *data, target)
        return {f"tempering_{name}": value for name, value in numbers.items()}

    return found | final.numbers("tempering_w2 and other distances", compared)


def _trainer(cfg: Config, chain: Chain, run: Run) -> PolicyTrainer | GradientTrainer:
    options: dict[str, Any] = {"iterations": cfg.run.iterations, "seed": cfg.run.seed, "ranks": run.ranks}
    if isinstance(chain, GradientChain):
        return GradientTrainer(chain, cfg.learning, gradient=cfg.gradient, **options)
    assert isinstance(chain, PolicyChain)
    levels, temperature = model.levels_of(cfg), cfg.target.temperature
    settings = cfg.learning, cfg.policy
    return PolicyTrainer(chain.networks, levels, *settings, temperature=temperature, **options)


def _picture(
    cfg: Config, target: Target, trainer: PolicyTrainer | GradientTrainer
) -> Callable[[IO[bytes]], None]:
    """A function that draws samples from fixed noise."""
    device = trainer.chain.start.log_std.device
    key = noise.Draws(cfg.run.seed, "pictures", ["sample"], device).at(0)["sample"]
    last_noise = cfg.evaluation.last_noise
    return lambda file: plots.samples(
        file, target, trainer.chain.sample(2000, key, last_noise=last_noise), None
    )


def _batches(target: Target, run: Run) -> Callable[[int], Tensor]:
    """iteration -> zeros in place of data; their rows are those of this rank."""
    nothing = torch.zeros(run.rows[0], target.free, device=run.device)
    return lambda iteration: nothing
