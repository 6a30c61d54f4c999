"""2D recipes: DDPM pretraining, DxMI, then pictures and a row of the paper's Table 1.

Imports torch and ``dxmi_ext``; scikit-learn and matplotlib where they are used.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dxmi_ext import checkpoint, config, generate, noise, plots, schedules, speed
from dxmi_ext.config import setting
from dxmi_ext.contrastive import LangevinTrainer
from dxmi_ext.data import two_d as data_two_d
from dxmi_ext.langevin import Langevin
from dxmi_ext.metrics import final
from dxmi_ext.metrics import two_d as metrics_two_d
from dxmi_ext.models.mlp import EnergyMLP, SamplerMLP, ValueMLP
from dxmi_ext.networks import Networks, TimeIndependent
from dxmi_ext.pretrain import Pretrainer, uniform_levels
from dxmi_ext.ranks import Ranks
from dxmi_ext.run import Run, settings_of
from dxmi_ext.sampler import GaussianSampler
from dxmi_ext.trainer import (
    DxMISettings,
    DxMITrainer,
    check_cuda_graph,
    check_energy_settings,
    density_temperature,
)

PAPER = {  # DxMI, Table 1: (pretrained, tau) -> SW, its deviation, AUC; 8 Gaussians, T = 5
    (True, 0.0): (0.074, 0.018, 0.707),
    (True, 0.01): (0.074, 0.017, 0.751),
    (True, 0.1): (0.068, 0.004, 0.898),
    (True, 1.0): (1.030, 0.004, 0.842),
    (False, 0.1): (0.076, 0.011, 0.883),
}
_NEEDS = {"sklearn": "entropy_excess and coverage", "matplotlib": "pictures"}
_LONGEST = 1000  # steps of a chain
_SIGMA_DATA = 2.0  # for EDM: about that of the 8 Gaussians; the checkerboard has 2.3, the spirals 1.6


@dataclasses.dataclass
class Config(DxMISettings, config.RunConfig):
    """Settings of a 2D run; the defaults are those of the recipes.

    Costs are means over dimensions, as in the authors' code. ``cost_reduction=sum`` makes tau twice as large:
    the 8 Gaussians then end at SW .094, AUROC .900.
    """

    heading = "data, schedule and networks"
    task: str = setting("two_d", "what kind of recipe", choices=("two_d",))
    iterations: int = setting(5000, "iterations of DxMI", minimum=0, maximum=config.LARGEST_RUN)
    pretrain_iterations: int = setting(
        600, "iterations of pretraining", minimum=0, maximum=config.LARGEST_RUN
    )
    batch_size: int = setting(128, "global batch size", minimum=1, maximum=2**20)
    log_every: int = setting(20, "iterations between lines of metrics.jsonl", minimum=1)
    threads: int = setting(
        1, "CPU threads of torch; networks of this size gain nothing from more", minimum=0, maximum=1024
    )
    data: str = setting("8gaussians", "density", choices=tuple(data_two_d.DENSITIES))
    steps: int = setting(5, "T, steps of the sampler", minimum=1, maximum=_LONGEST)
    lengths: str | None = setting(
        None, "T of all chains that one sampler learns, as 1,2,5,10, `steps` among them; null: steps alone"
    )
    schedule: str = setting(
        "variance_exploding",
        "of the sampler: geometric levels from sigma_max to sigma_min; edm: EDM's between the same, rho = 7, "
        "with a network that tells F; ddpm: DDPM's linear betas, T of them from 1e-4 to .02; respaced_ddpm: "
        "T of the levels that DDPM has with 1000 betas",
        choices=("variance_exploding", "edm", "ddpm", "respaced_ddpm"),
    )
    sampler_width: int = setting(128, "width of the sampler's hidden layers", minimum=1, maximum=2**14)
    sampler_depth: int = setting(3, "hidden layers of the sampler", minimum=1, maximum=100)
    value_kind: str = setting(
        "per_step",
        "V: a head a step, the last the energy; time_independent: V^t = E at every step (Algorithm 2); "
        "separate: beside an energy network of its own",
        choices=("per_step", "time_independent", "separate"),
    )
    value_width: int = setting(128, "width of the value's hidden layers", minimum=1, maximum=2**14)
    value_depth: int = setting(3, "hidden layers of the value", minimum=1, maximum=100)
    octaves: int = setting(
        0,
        "sinusoids of the coordinates that networks see beside them: wavelengths 8, 4, 2, ...",
        minimum=0,
        maximum=24,
    )
    sigma_max: float = setting(3.0, "noise level of the sampler's first step", minimum=0)
    sigma_min: float = setting(0.4, "noise level of its last step", minimum=0)
    min_std: float = setting(0.05, "lower bound of the initial sigma of a step", minimum=1e-6)
    pretrain_lr: float = setting(2e-3, "learning rate of pretraining, decayed to 0", minimum=0)
    samplings: int = setting(
        5, "fresh samples and data that the final numbers are means over", minimum=1, maximum=1000
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.sigma_min < self.sigma_max:
            raise config.ConfigError(
                f"sigma_min: got {self.sigma_min!r}, wants a value between 0 and sigma_max={self.sigma_max!r}"
            )
        got = f"steps: got {self.steps}" if self.lengths is None else f"lengths: got {self.lengths!r}"
        if self.schedule == "edm" and min(self.all_steps) < 2:
            raise config.ConfigError(f"{got}, wants 2 or more with schedule=edm")
        if self.schedule == "respaced_ddpm" and max(self.all_steps) > 1000:
            raise config.ConfigError(f"{got}, wants at most 1000 with schedule=respaced_ddpm")
        if self.steps not in self.all_steps:
            raise config.ConfigError(f"lengths: got {self.lengths!r}, wants steps={self.steps} among them")
        if self.lengths is not None and (self.cuda_graph or self.skip_last or not self.trains_sampler):
            raise config.ConfigError(
                f"lengths: got {self.lengths!r}, wants none with cuda_graph, skip_last or Langevin negatives"
            )
        if self.skip_last > self.steps:
            raise config.ConfigError(f"skip_last: got {self.skip_last}, wants at most steps={self.steps}")
        check_energy_settings(self, self.value_kind)
        if self.cuda_graph and self.device == "cpu":
            raise config.ConfigError("cuda_graph: got true, wants a CUDA device, but device=cpu")

    @property
    def all_steps(self) -> list[int]:
        """T of all chains that the sampler learns.

        Raises:
            config.ConfigError: they are no such numbers.
        """
        texts = str(self.steps).split() if self.lengths is None else self.lengths.split(",")
        lengths = [int(text) if re.fullmatch(r"\s*[0-9]{1,4}\s*", text) else 0 for text in texts]
        if not all(1 <= steps <= _LONGEST for steps in lengths) or len({*lengths}) < len(lengths):
            raise config.ConfigError(
                f"lengths: got {self.lengths!r}, wants numbers of steps, as 1,2,5, each once and at most "
                f"{_LONGEST}"
            )
        return lengths


@dataclasses.dataclass
class EvaluateSettings(config.EvaluateSettings):
    """Settings of the command ``evaluate``."""

    samplings: int | None = setting(
        None, "fresh samples and data that numbers are means over; null: as in training", minimum=1
    )


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to its end and returns the summary, on the first rank."""
    run = Run(cfg, ranks)
    if run.finished():
        return {}
    check_cuda_graph(cfg, run.device, run.ranks)
    with run:
        networks, schedule = build(cfg, run.device)
        run.describe(networks)
        if run.ranks.first:
            final.announce_missing(_NEEDS)
        if cfg.pretrained and cfg.trains_sampler:
            _pretrain(run, cfg, networks, schedule)
        phase, trains = ("dxmi", DxMITrainer) if cfg.trains_sampler else ("langevin", LangevinTrainer)
        trainer = trains(networks, cfg, iterations=cfg.iterations, seed=cfg.seed, ranks=run.ranks)
        picture = _picture(cfg, trainer.averaged, trained=True)
        run.phase(phase, trainer, cfg.iterations, _batches(cfg, "dxmi", run), picture)
        averaged = run.ranks.whole(trainer.averaged)
        if cfg.dry_run or not run.ranks.first:
            return {}
        tau_factor = float(trainer.temperature.factor) if isinstance(trainer, DxMITrainer) else 1.0
        _save_model(run.directory / "model", averaged, cfg, tau_factor)
        numbers = evaluate_networks(cfg, averaged, seed=cfg.seed, tau_factor=tau_factor)
        final.attempt("pictures", lambda: draw_pictures(run.directory, cfg, averaged))
        summary = run.summarize({"samples": samples_of(cfg), **numbers})
    print(table(cfg, numbers))
    print(f"{run.directory}: summary.json, model/, pictures; {summary['wall_seconds']} s")
    return summary


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the pretraining alone; training with the same output goes on from it."""
    if not cfg.pretrained:
        raise config.ConfigError("pretrained: got false, but pretraining alone was asked for")
    run = Run(cfg, ranks)
    if run.finished():
        return
    with run:
        networks, schedule = build(cfg, run.device)
        if "pretrain" in run.past:
            print(f"{run.directory} is past its pretraining; nothing to do")
            return
        run.describe(networks)
        _pretrain(run, cfg, networks, schedule)
        networks = run.ranks.whole(networks)
        if cfg.dry_run or not run.ranks.first:
            return
        _save_model(run.directory / "model", networks, cfg)
        print(f"{run.directory}: pretrained; `dxmi train` with output={run.directory} goes on from here")


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[generate.Batch]:
    """Samples [m, 2] of a run's final sampler, or of Langevin chains where it trained none, as
    `generate.batches`."""
    cfg, networks = load(directory, device)
    chains = None if cfg.trains_sampler else _chains(cfg)
    return generate.batches(networks, rows, seed, batch_size=batch_size, chains=chains, **options)


def evaluate(
    directory: Path, settings: EvaluateSettings, device: torch.device
) -> tuple[dict[str, float], str]:
    """The numbers of a run's final networks and their table, with noise and data of a seed of one's own."""
    cfg, networks = load(directory, device)
    _, about = checkpoint.load_model_state(directory / "model")
    cfg.samplings = settings.samplings or cfg.samplings
    numbers = evaluate_networks(cfg, networks, seed=settings.seed, tau_factor=about.get("tau_factor", 1.0))
    return numbers, table(cfg, numbers)


def build(cfg: Config, device: torch.device) -> tuple[Networks, schedules.Schedule]:
    """The networks, their weights drawn from the seed, and the sampler's schedule."""
    schedule = _schedule(cfg)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)
        network = SamplerMLP(2, sum(cfg.all_steps), cfg.sampler_width, cfg.sampler_depth, cfg.octaves)
        size = cfg.value_width, cfg.value_depth, cfg.octaves
        value: nn.Module
        if cfg.value_kind == "time_independent":
            value, energy = TimeIndependent(EnergyMLP(2, *size)), None
        else:
            value = ValueMLP(2, cfg.all_steps, *size)
            energy = EnergyMLP(2, *size) if cfg.value_kind == "separate" else None
    sampler = GaussianSampler(network, schedule, (2,), lengths=cfg.all_steps)
    sampler.use(cfg.steps)
    return Networks(sampler, value, energy).to(device), schedule


def load(directory: Path, device: torch.device) -> tuple[Config, Networks]:
    """A run's settings and final networks.

    Raises:
        checkpoint.CheckpointError: there are none, or they are damaged.
    """
    tensors, _ = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        networks, _ = build(cfg, device)
        networks.load_state_dict(tensors)
    return cfg, networks.eval()


def evaluate_networks(
    cfg: Config, networks: Networks, *, seed: int, tau_factor: float = 1.0
) -> dict[str, float]:
    """The numbers of `metrics.two_d.evaluate`; energy_kl where there is a temperature; of a sampler that
    knows several T also sliced_wasserstein_tT of each. What cannot be computed is left out.

    Args:
        tau_factor: of tau at the run's end, where it was not fixed.
    """
    device = networks.sampler.log_std.device
    draws = noise.Draws(seed, "evaluate", ["sample", "data"], device)
    own, of_lengths = dict[str, float](), dict[str, float]()
    for steps in sorted(cfg.all_steps, key=lambda steps: steps == cfg.steps):  # its own last: that stays
        networks.sampler.use(steps)
        own = final.numbers(
            f"numbers at T = {steps}",
            lambda: metrics_two_d.evaluate(
                lambda n, draw: _draw(cfg, networks, n, draws.at(draw)["sample"]),
                lambda n, draw: data_two_d.sample(cfg.data, n, draws.at(draw)["data"]),
                torch.no_grad()(networks.energy),
                repeats=cfg.samplings,
                seed=seed,
            ),
        )
        if cfg.lengths is not None and "sliced_wasserstein" in own:
            of_lengths[f"sliced_wasserstein_t{steps}"] = own["sliced_wasserstein"]
    numbers = own | of_lengths
    if temperature := tau_factor * temperature_of(cfg):
        kl = final.number(
            "energy_kl",
            lambda: metrics_two_d.energy_kl(
                torch.no_grad()(networks.energy),
                lambda x: data_two_d.log_density(cfg.data, x),
                temperature,
                device=device,
            ),
        )
        numbers |= {} if kl is None else {"energy_kl": kl}
    return numbers


def temperature_of(cfg: Config) -> float:
    """That of the density exp(-E / temperature) / Z."""
    return density_temperature(cfg, 2) if cfg.trains_sampler else cfg.tau


def draw_pictures(directory: Path, cfg: Config, networks: Networks) -> None:
    """samples.png, energy.png, curves.png, and paths.png of a sampler."""
    device = networks.sampler.log_std.device
    keys = noise.Draws(cfg.seed, "pictures", ["sample", "data"], device).at(0)
    data = data_two_d.sample(cfg.data, 5000, keys["data"])
    energies = torch.no_grad()(networks.energy)(plots.grid().to(device))
    plots.samples(directory / "samples.png", data, _draw(cfg, networks, 5000, keys["sample"]))
    plots.energy(directory / "energy.png", energies, data[:300])
    if cfg.trains_sampler:
        plots.paths(directory / "paths.png", networks.sampler.rollout(1000, keys["sample"]).samples)
    plots.curves(directory / "curves.png", directory / "metrics.jsonl")


def samples_of(cfg: Config) -> str:
    """What a run's samples are drawn from."""
    if cfg.trains_sampler:
        return "sampler"
    return f"Langevin chains from noise, {cfg.sample_steps} steps each"


def table(cfg: Config, numbers: dict[str, float]) -> str:
    """The run's row, the paper's beside it where it has one."""
    start = "pretrained" if cfg.pretrained else "from scratch"
    taus = [cfg.tau if tau is None else tau for tau in (cfg.tau_entropy, cfg.tau_velocity)]
    tau = " and ".join(f"{each:g}" for each in dict.fromkeys(taus)) + ", then automatic" * bool(cfg.tau_rate)
    title = f"{cfg.data}, T = {cfg.steps}, tau = {tau}, {start}"
    if not cfg.trains_sampler:
        title = f"{cfg.data}, tau = {cfg.tau:g}, negatives: {cfg.negatives}; samples: {samples_of(cfg)}"
    rows = [title, f"{'':12}{'SW':>16}{'AUROC':>16}"]
    rows.append(f"{'this run':12}{_cell(numbers, 'sliced_wasserstein')}{_cell(numbers, 'auroc')}")
    published = cfg.data == "8gaussians" and cfg.steps == 5 and cfg.negatives == "sampler"
    published &= not cfg.tau_rate and taus[0] == taus[1]
    if published and (cfg.pretrained, taus[0]) in PAPER:
        paper_sw, deviation, paper_auroc = PAPER[cfg.pretrained, taus[0]]
        rows.append(f"{'the paper':12}{paper_sw:8.3f} ± {deviation:.3f}{paper_auroc:8.3f}")
    if (floor := numbers.get("sliced_wasserstein_floor")) is not None:
        rows.append(f"{'data itself':12}{floor:8.3f}")
    return "\n".join(rows)


def _cell(numbers: dict[str, float], name: str) -> str:
    if name not in numbers:
        return f"{'-':>16}"
    return f"{numbers[name]:8.3f} ± {numbers[f'{name}_std']:.3f}"


def _schedule(cfg: Config) -> schedules.Schedule:
    return schedules.joined([_chain(cfg, steps) for steps in cfg.all_steps])


def _chain(cfg: Config, steps: int) -> schedules.Schedule:
    if cfg.schedule == "ddpm":
        return schedules.ddpm(schedules.make_betas(steps=steps), min_std=cfg.min_std)
    if cfg.schedule == "respaced_ddpm":  # from pure noise on, so trailing
        return schedules.ddim(steps, eta=1.0, spacing="trailing", min_std=cfg.min_std)
    if cfg.schedule == "edm":
        return schedules.edm(
            steps,
            sigma_max=cfg.sigma_max,
            sigma_min=cfg.sigma_min,
            sigma_data=_SIGMA_DATA,
            min_std=cfg.min_std,
        )
    return schedules.variance_exploding(
        steps, sigma_max=cfg.sigma_max, sigma_min=cfg.sigma_min, min_std=cfg.min_std
    )


def _draw(cfg: Config, networks: Networks, n: int, key: Tensor, batch_size: int = 4096) -> Tensor:
    """Samples [n, 2] of the sampler, or of Langevin chains where none was trained."""
    if cfg.trains_sampler:
        return networks.sampler.sample(n, key, batch_size=batch_size)
    return _chains(cfg).sample(networks, n, key, batch_size=batch_size)


def _chains(cfg: Config) -> Langevin:
    return dataclasses.replace(Langevin.of(cfg, cfg.tau), steps=cfg.sample_steps)


def _pretrain(run: Run, cfg: Config, networks: Networks, schedule: schedules.Schedule) -> None:
    speed.prepare(cfg, networks.sampler)
    pretrainer = Pretrainer(
        networks.sampler.network,
        uniform_levels(schedule.signal, schedule.noise),
        prediction="edm" if cfg.schedule == "edm" else "eps",
        sigma_data=_SIGMA_DATA,
        lr=cfg.pretrain_lr,
        iterations=cfg.pretrain_iterations,
        seed=cfg.seed,
        ranks=run.ranks,
        settings=cfg,
    )
    batch, picture = _batches(cfg, "pretrain", run), _picture(cfg, networks)
    run.phase("pretrain", pretrainer, cfg.pretrain_iterations, batch, picture)


def _picture(cfg: Config, networks: Networks, *, trained: bool = False) -> Callable[[IO[bytes]], None] | None:
    """Draws samples of fixed noise: over the energy, or beside data where none is trained yet."""
    if cfg.shard:  # the first rank alone has no whole networks
        return None
    device = networks.sampler.log_std.device
    keys = noise.Draws(cfg.seed, "pictures", ["sample", "data"], device).at(0)

    def draw(file: IO[bytes]) -> None:
        if trained:
            samples = _draw(cfg, networks, 2000, keys["sample"])
            energies = torch.no_grad()(networks.energy)(plots.grid().to(device))
            plots.energy(file, energies, samples, title="samples over the energy")
        else:
            data = data_two_d.sample(cfg.data, 2000, keys["data"])
            plots.samples(file, data, networks.sampler.sample(2000, keys["sample"]))

    return draw


def _batches(cfg: Config, phase: str, run: Run) -> Callable[[int], Tensor]:
    """iteration -> this rank's rows of the data."""
    draws = noise.Draws(cfg.seed, f"data of {phase}", ["data"], run.device)
    count, offset = run.rows
    return lambda iteration: data_two_d.sample(
        cfg.data, count, draws.at(iteration)["data"], sample_offset=offset
    )


def _save_model(path: Path, networks: Networks, cfg: Config, tau_factor: float = 1.0) -> None:
    shape = ("data", "steps", "sampler_width", "sampler_depth", "value_width", "value_depth")
    about = {"task": cfg.task, **{key: getattr(cfg, key) for key in shape}, "tau_factor": tau_factor}
    checkpoint.save_model(path, networks, about)
