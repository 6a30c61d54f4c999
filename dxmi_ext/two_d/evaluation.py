"""Evaluation of a 2D run: its metrics, its plots and its row of the paper's Table 1.

Imports torch, the engine and the method; scikit-learn and matplotlib where they are used.
"""

from __future__ import annotations

from pathlib import Path

import torch

from dxmi_ext.engine.output.plots import curves
from dxmi_ext.engine.runs import final
from dxmi_ext.method import noise
from dxmi_ext.method.costs import density_temperature
from dxmi_ext.method.networks import Networks
from dxmi_ext.two_d import densities, metrics, plots, sources
from dxmi_ext.two_d.model import draw
from dxmi_ext.two_d.settings import Config

PAPER = {  # DxMI, Table 1: (pretrained, tau) -> SW, its deviation, AUC; 8 Gaussians, T = 5
    (True, 0.0): (0.074, 0.018, 0.707),
    (True, 0.01): (0.074, 0.017, 0.751),
    (True, 0.1): (0.068, 0.004, 0.898),
    (True, 1.0): (1.030, 0.004, 0.842),
    (False, 0.1): (0.076, 0.011, 0.883),
}


def evaluate_networks(
    cfg: Config, networks: Networks, *, seed: int, tau_factor: float = 1.0
) -> dict[str, float]:
    """The metrics of `metrics.evaluate`; energy_kl if there is a temperature; sliced_wasserstein_tT for each
    T of a sampler with several. Metrics that cannot be computed are skipped.

    Args:
        tau_factor: factor of tau at the end of the run, if it was automatic.
    """
    device = networks.sampler.log_std.device
    draws = noise.Draws(seed, "evaluate", ["sample", "data"], device)
    data = sources.of(cfg.density.data, device)
    own, of_lengths = dict[str, float](), dict[str, float]()
    lengths = [*cfg.chain.all_steps, *cfg.evaluation.all_untrained]
    others = [steps for steps in lengths if steps != cfg.chain.steps]
    for steps in (*others, cfg.chain.steps):  # the run's own T last, which stays set
        networks.sampler.use(steps)
        own = final.numbers(
            f"numbers at T = {steps}",
            lambda: metrics.evaluate(
                lambda n, i: draw(cfg, networks, n, draws.at(i)["sample"]),
                lambda n, i: data.tested(n, draws.at(i)["data"], trained=i % 2 == 1),
                torch.no_grad()(networks.energy),
                repeats=cfg.evaluation.samplings,
                seed=seed,
                **data.sampling,
            ),
        )
        if (cfg.chain.lengths or others) and "sliced_wasserstein" in own:
            of_lengths[f"sliced_wasserstein_t{steps}"] = own["sliced_wasserstein"]
    numbers = own | of_lengths
    if data.units is None and (temperature := tau_factor * temperature_of(cfg)):
        kl = final.number(
            "energy_kl",
            lambda: metrics.energy_kl(
                torch.no_grad()(networks.energy),
                lambda x: densities.log_density(cfg.density.data, x),
                temperature,
                device=device,
            ),
        )
        numbers |= {} if kl is None else {"energy_kl": kl}
    return numbers


def temperature_of(cfg: Config) -> float:
    """The temperature in the density exp(-E / temperature) / Z."""
    return density_temperature(cfg.algorithm, 2) if cfg.algorithm.trains_sampler else cfg.algorithm.tau


def draw_pictures(directory: Path, cfg: Config, networks: Networks) -> None:
    """Draws samples.png, energy.png, curves.png, and paths.png if there is a sampler, in the data's units."""
    device = networks.sampler.log_std.device
    keys = noise.Draws(cfg.run.seed, "pictures", ["sample", "data"], device).at(0)
    source = sources.of(cfg.density.data, device)
    box, data = source.restored(source.box), source.restored(source.sample(5000, keys["data"]))
    energies = torch.no_grad()(networks.energy)(plots.grid(box=source.box).to(device))
    samples = source.restored(draw(cfg, networks, 5000, keys["sample"]))
    plots.samples(directory / "samples.png", data, samples, box=box)
    plots.energy(directory / "energy.png", energies, data[:300], box=box)
    if cfg.algorithm.trains_sampler:
        paths = source.restored(networks.sampler.rollout(1000, keys["sample"]).samples)
        plots.paths(directory / "paths.png", paths, box=box)
    curves(directory / "curves.png", directory / "metrics.jsonl")


def samples_of(cfg: Config) -> str:
    """The source of a run's samples, for titles."""
    if cfg.algorithm.trains_sampler:
        return "sampler"
    return f"Langevin chains from noise, {cfg.langevin.sample_steps(cfg.algorithm.negatives)} steps each"


def table(cfg: Config, numbers: dict[str, float]) -> str:
    """The run's row, with the paper's if there is one."""
    start = "pretrained" if cfg.run.pretrained else "from scratch"
    taus = [cfg.algorithm.entropy_tau, cfg.algorithm.velocity_tau]
    tau = " and ".join(f"{each:g}" for each in dict.fromkeys(taus))
    if cfg.algorithm.tau_rate:
        tau += ", then automatic"
    elif cfg.algorithm.tau_cooling < 1:
        tau += ", then cooled"
    title = f"{cfg.density.data}, T = {cfg.chain.steps}, tau = {tau}, {start}"
    if not cfg.algorithm.trains_sampler:
        title = f"{cfg.density.data}, tau = {cfg.algorithm.tau:g}, negatives: {cfg.algorithm.negatives}; "
        title += f"samples: {samples_of(cfg)}"
    rows = [title, f"{'':12}{'SW':>16}{'AUROC':>16}"]
    rows.append(f"{'this run':12}{_cell(numbers, 'sliced_wasserstein')}{_cell(numbers, 'auroc')}")
    published = (
        cfg.density.data == "8gaussians" and cfg.chain.steps == 5 and cfg.algorithm.negatives == "sampler"
    )
    published &= not cfg.algorithm.tau_rate and cfg.algorithm.tau_cooling == 1 and taus[0] == taus[1]
    if published and (cfg.run.pretrained, taus[0]) in PAPER:
        paper_sw, deviation, paper_auroc = PAPER[cfg.run.pretrained, taus[0]]
        rows.append(f"{'the paper':12}{paper_sw:8.3f} ± {deviation:.3f}{paper_auroc:8.3f}")
    if "sliced_wasserstein_floor" in numbers:
        rows.append(f"{'data itself':12}{_cell(numbers, 'sliced_wasserstein_floor')}")
    return "\n".join(rows)


def _cell(numbers: dict[str, float], name: str) -> str:
    if name not in numbers:
        return f"{'-':>16}"
    return f"{numbers[name]:8.3f} ± {numbers[f'{name}_std']:.3f}"
