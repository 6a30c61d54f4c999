"""Image recipes: a diffusion model, pretrained here or given, is made good at a few steps (DxMI, sec. 5).

Imports torch and ``dxmi_ext``; diffusers, Pillow and the feature network where they are used.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dxmi_ext import checkpoint, config, generate, noise, plots, runlog, schedules, sharding, speed
from dxmi_ext.config import ConfigError, setting
from dxmi_ext.data import images as data_images
from dxmi_ext.data import overview
from dxmi_ext.data.images import ImageData
from dxmi_ext.data.overview import Overview
from dxmi_ext.data.pixels import Scale
from dxmi_ext.errors import UserError
from dxmi_ext.metrics import features, final
from dxmi_ext.metrics import images as metrics
from dxmi_ext.models import pretrained as pretrained_models
from dxmi_ext.models.energy import ResNetEnergy, ResNetValue
from dxmi_ext.models.pretrained import DDPM, EDM
from dxmi_ext.models.unet import ARCHITECTURES, UNet, unet
from dxmi_ext.networks import Networks, TimeIndependent
from dxmi_ext.prefetch import Prefetcher
from dxmi_ext.pretrain import Pretrainer, lognormal_levels, uniform_levels
from dxmi_ext.ranks import Ranks
from dxmi_ext.run import Fingerprints, Run, changed, data_of, fingerprint, settings_of
from dxmi_ext.sampler import Clipped, GaussianSampler, Timed
from dxmi_ext.schedules import Schedule
from dxmi_ext.solvers import SOLVERS, SolverSampler, karras_sigmas, time_in_table
from dxmi_ext.trainer import DxMISettings, DxMITrainer, check_cuda_graph, check_energy_settings

_PREDICTIONS = {"epsilon": "eps", "sample": "x", "v_prediction": "v"}  # diffusers' names and ours
_KINDS: dict[str, Any] = {ours: theirs for theirs, ours in _PREDICTIONS.items()}
_CLIPPED = "-clipped"
_PICTURED = 64
Sampler = GaussianSampler | SolverSampler


@dataclasses.dataclass
class Config(DxMISettings, config.RunConfig):
    """Settings of an image run."""

    heading = "data, schedule, networks and evaluation"
    task: str = setting("images", "what kind of recipe", choices=("images",))
    batch_size: int = setting(
        128, "global batch size; the number of ranks must divide it", minimum=1, maximum=2**20
    )
    data: str | None = setting(
        None, "images: CIFAR-10, MNIST's idx files, npz, or folders of pictures", path=True
    )
    cache: str | None = setting(
        None, "folder of decoded images; null: dxmi_ext in the user's cache", path=True
    )
    image_size: int | None = setting(None, "height and width; null: as they are", minimum=1, maximum=4096)
    flip: bool = setting(True, "mirror half of the images")
    conditional: bool = setting(False, "on the images' classes: sampler, value and energy")
    start: str | None = setting(
        None,
        "network to start from: a run's folder, a diffusers folder, or hub:OWNER/NAME; null: pretrain one",
        path=True,
    )
    unet: str = setting("small", "the sampler's network, where none is given", choices=tuple(ARCHITECTURES))
    patch: int = setting(
        1, "side of the squares of pixels that a new U-Net sees as channels", minimum=1, maximum=4096
    )
    steps: int = setting(10, "T, steps of the sampler", minimum=2, maximum=10_000)
    schedule: str = setting(
        "fastdpm", "of the sampler; edm goes with EDM's networks", choices=("fastdpm", "ddim", "edm")
    )
    prediction: str = setting("eps", "what the network tells in fastdpm and ddim", choices=("eps", "v", "x"))
    eta: float = setting(
        1.0, "share of the posterior's std; 0: as little noise as may be", minimum=0, maximum=1
    )
    rho: float = setting(7.0, "density of EDM's noise levels near the data", minimum=0.1)
    sigma_min: float = setting(0.002, "EDM's last noise level", minimum=1e-6)
    sigma_max: float = setting(80.0, "EDM's first noise level", minimum=1e-6)
    sigma_data: float = setting(0.5, "standard deviation of the data, for EDM", minimum=1e-6)
    time_scale: float = setting(1.0, "EDM's network gets time_scale ln(sigma) / 4 as its time", minimum=1e-6)
    stochastic_last: bool = setting(False, "EDM: the last step ends at sigma_min, with its noise")
    min_std: float = setting(1e-3, "lower bound of the initial sigma of a step", minimum=1e-6)
    value_kind: str = setting(
        "time_independent",
        "V: time_independent: V^t = E at every step (Algorithm 2); per_step; separate: beside an energy",
        choices=("time_independent", "per_step", "separate"),
    )
    energy_width: int = setting(
        128, "width of the value's and the energy's networks", minimum=1, maximum=4096
    )
    pretrain_lr: float = setting(2e-4, "learning rate of pretraining, decayed to 0", minimum=0)
    pretrain_warmup: int = setting(0, "iterations in which pretraining's learning rate rises", minimum=0)
    level_mean: float = setting(-1.2, "mean of ln(sigma) in pretraining for EDM")
    level_std: float = setting(1.2, "standard deviation of ln(sigma) in pretraining for EDM", minimum=0)
    pretrain_ema_decay: float = setting(0.9995, "of the pretrained network's average", minimum=0, below=1)
    pretrain_clip: float = setting(1.0, "largest gradient norm of pretraining; 0: any", minimum=0)
    features: str | None = setting(
        "efflite0",
        "network of the metrics: efflite0, or the path of Inception's weights; null: no metrics",
        path=True,
    )
    evaluate_n: int = setting(10_000, "samples, and training images, that the metrics compare", minimum=4)
    sample_batch: int = setting(250, "rows that the networks see at a time in evaluation", minimum=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sigma_min < self.sigma_max:
            raise ConfigError(f"sigma_min: got {self.sigma_min}, wants less than sigma_max={self.sigma_max}")
        if self.skip_last > self.steps:
            raise ConfigError(f"skip_last: got {self.skip_last}, wants at most steps={self.steps}")
        if not self.trains_sampler:
            raise ConfigError(f"negatives: got {self.negatives}, wants sampler or refined in image recipes")
        if self.start is not None and not self.pretrained:
            raise ConfigError(f"pretrained: got false, but start={self.start} is a network to start from")
        check_energy_settings(self, self.value_kind)


@dataclasses.dataclass
class EvaluateSettings(config.EvaluateSettings):
    """Settings of the command ``evaluate``."""

    n: int | None = setting(None, "number of samples; null: as in the run", minimum=4)
    data: str | None = setting(None, "where the images of the run are now; null: where they were", path=True)
    chain: str | None = setting(
        None,
        "another way to sample from the run's network: a chain as fastdpm-4, ddim-100, ddpm-1000, edm-79 or "
        "edm-ancestral-100, or a solver, heun-18 or dpmpp-10; -clipped keeps the predicted data in [-1, 1]",
    )
    picture: str | None = setting(None, "png file to write a grid of samples to; null: none", path=True)


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe to its end and returns the summary, on the first rank."""
    run = Run(cfg, ranks, _fingerprints(cfg))
    if run.finished():
        return {}
    with run:
        data, networks, diffusion = _prepare(run, cfg)
        if run.ranks.first:
            _announce(cfg, data)
        if cfg.pretrained and cfg.start is None:
            _pretrain(run, cfg, data, networks, diffusion)
        trainer = DxMITrainer(networks, cfg, iterations=cfg.iterations, seed=cfg.seed, ranks=run.ranks)
        with _batches(cfg, data, "dxmi", run, cfg.iterations) as batches:
            picture = _picture(cfg, trainer.averaged.sampler, data)
            run.phase("dxmi", trainer, cfg.iterations, batches, picture)
        averaged = run.ranks.whole(trainer.averaged)
        if cfg.dry_run or not run.ranks.first:
            return {}
        _save_model(run.directory / "model", averaged, cfg, data, diffusion)
        numbers = _finish(run, cfg, data, averaged)
        summary = run.summarize(numbers)
    print(table(numbers))
    print(f"{run.directory}: summary.json, model/, pictures; {summary['wall_seconds']} s")
    return summary


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the pretraining alone; training with the same output, or with it as ``start``, goes on from it."""
    if cfg.start is not None or not cfg.pretrained:
        raise ConfigError("start, pretrained: got a network or false, but pretraining alone was asked for")
    run = Run(cfg, ranks, _fingerprints(cfg))
    if run.finished():
        return
    with run:
        data, networks, diffusion = _prepare(run, cfg)
        if "pretrain" in run.past:
            print(f"{run.directory} is past its pretraining; nothing to do")
            return
        _pretrain(run, cfg, data, networks, diffusion)
        networks = run.ranks.whole(networks)
        if cfg.dry_run or not run.ranks.first:
            return
        _save_model(run.directory / "model", networks, cfg, data, diffusion)
        _draw_samples(run.directory / "samples.png", cfg, networks.sampler, data.classes)
        print(f"{run.directory}: pretrained, model/; `dxmi train` with start={run.directory} goes on from it")


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[generate.Batch]:
    """Samples [m, C, H, W] of a run's final sampler, near [-1, 1], as `generate.batches`."""
    _, networks = load(directory, device)
    classes = _classes_of(networks.sampler)
    return generate.batches(networks, rows, seed, batch_size=batch_size, classes=classes, **options)


def evaluate(
    directory: Path, settings: EvaluateSettings, device: torch.device
) -> tuple[dict[str, float], str]:
    """The metrics of a run's final network, by its own few steps or another chain.

    Raises:
        ConfigError: the data are not those that the run was trained on, or no such chain.
    """
    cfg, networks, diffusion = _load(directory, device)
    cfg = dataclasses.replace(cfg, evaluate_n=settings.n or cfg.evaluate_n, data=settings.data or cfg.data)
    sampler: Sampler = networks.sampler
    if settings.chain is not None:
        sampler = _other_sampler(settings.chain, networks.sampler, cfg, diffusion).to(device)
    _, about = checkpoint.load_model_state(directory / "model")
    data, known = _load_data(cfg, scale=Scale.of(about.get("scale"))), data_of(directory)
    if settings.data is not None and not known:
        runlog.note(f"{directory} has no fingerprint of its data; {settings.data} is taken to hold them")
    if changed(known, _fingerprints_of(data)):
        raise ConfigError(
            f"data: {str(cfg.data)!r} must hold the images that {directory} was trained on, but has another "
            "fingerprint; data=PATH names another place"
        )
    if settings.picture is not None:
        _draw_samples(Path(settings.picture), cfg, sampler, data.classes)
    numbers = _scores(cfg, data, sampler, seed=settings.seed)
    return numbers, table(numbers)


def load(directory: Path, device: torch.device) -> tuple[Config, Networks]:
    """A run's settings and final networks.

    Raises:
        checkpoint.CheckpointError: there are none, or they are damaged.
    """
    cfg, networks, _ = _load(directory, device)
    return cfg, networks


def _load(directory: Path, device: torch.device) -> tuple[Config, Networks, DDPM | EDM]:
    tensors, about = checkpoint.load_model_state(directory / "model", device)
    cfg = settings_of(Config, directory)
    with checkpoint.fitting(directory):
        network, diffusion = _rebuilt(about)
        networks = _networks(cfg, network, tuple(about["data_shape"]), about["classes"], diffusion)
        networks.load_state_dict(tensors)
    return cfg, networks.to(device).eval(), diffusion


def read(cfg: Config) -> Overview:
    """What the settings' data are, told before they are decoded.

    Raises:
        ConfigError: there are none.
        ImageDataError: they cannot be read.
    """
    return overview.of_images(_path(cfg))


def table(numbers: dict[str, float]) -> str:
    """Metrics, one a line, each beside what as many test images score."""
    rows = {name: value for name, value in numbers.items() if not name.endswith(("_floor", "_std"))}
    lines = [f"{'':32}{'this run':>10}{'test images':>14}"]
    for name, value in rows.items():
        floor = numbers.get(f"{name}_floor")
        lines.append(f"{name:32}{value:10.4g}{'' if floor is None else f'{floor:14.4g}'}")
    return "\n".join(lines)


def _prepare(run: Run, cfg: Config) -> tuple[ImageData, Networks, DDPM | EDM]:
    """Data, networks and what the sampler's network was, or will be, trained for. What is missing shows here,
    not after hours."""
    if cfg.pretrained and cfg.start is None and not cfg.pretrain_iterations and not cfg.dry_run:
        raise ConfigError(
            "start: got none, wants a network, or pretrain_iterations above 0, or pretrained=false"
        )
    check_cuda_graph(cfg, run.device, run.ranks)
    if run.ranks.first:
        print(read(cfg).lines())
    data = _load_data(cfg)
    classes = _classes(cfg, data)
    if cfg.features is not None and run.ranks.first:
        features.load(cfg.features)
    try:
        network, diffusion = _network(cfg, data.shape, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed + 1)
            networks = _networks(cfg, network, data.shape, classes, diffusion).to(run.device)
    except ValueError as error:  # of schedules and U-Nets; it names the setting
        raise error if isinstance(error, UserError) else ConfigError(str(error)) from error
    run.describe(networks)
    return data, networks, diffusion


def _path(cfg: Config) -> str:
    if cfg.data is None:
        raise ConfigError("data: got none, wants the path of images; `dxmi train RECIPE --help` tells more")
    return cfg.data


def _load_data(cfg: Config, split: str = "train", scale: Scale | None = None) -> ImageData:
    return data_images.load(_path(cfg), split=split, size=cfg.image_size, cache=cfg.cache, scale=scale)


def _fingerprints(cfg: Config) -> Callable[[str], Fingerprints]:
    """Those of the images at a path, as the run sees them."""
    return lambda path: _fingerprints_of(_load_data(dataclasses.replace(cfg, data=path)))


def _fingerprints_of(data: ImageData) -> Fingerprints:
    return {"train": fingerprint(data.fingerprint, data.labels, data.class_names)}


def _classes(cfg: Config, data: ImageData) -> int | None:
    if not cfg.conditional:
        return None
    if not data.classes:
        raise ConfigError(f"conditional: got true, but the images of {cfg.data} have no classes")
    return data.classes


def _network(cfg: Config, shape: tuple[int, int, int], classes: int | None) -> tuple[UNet, DDPM | EDM]:
    """The sampler's network, new or given, and its diffusion."""
    wants_edm = cfg.schedule == "edm"
    own: DDPM | EDM = DDPM(schedules.make_betas(), _KINDS[cfg.prediction])
    if wants_edm:
        own = EDM(cfg.sigma_data, cfg.sigma_min, cfg.sigma_max, cfg.time_scale)
    if cfg.start is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.seed)
            return unet(cfg.unet, shape, classes, cfg.patch), own
    if (Path(cfg.start) / "model").is_dir():
        network, diffusion, of = _of_run(Path(cfg.start))
        if of != (tuple(shape), classes):
            raise ConfigError(
                f"start: {cfg.start} is for shape and classes {of}, the data {(shape, classes)}"
            )
    else:
        given = pretrained_models.load(cfg.start, shape, classes)
        network, diffusion = given.network, given.diffusion or own
    if isinstance(diffusion, EDM) != wants_edm:
        kind = "EDM's network" if isinstance(diffusion, EDM) else "a network of betas"
        raise ConfigError(f"schedule: got {cfg.schedule}, but {cfg.start} holds {kind}")
    if isinstance(diffusion, EDM) and cfg.changed("sigma_data") and cfg.sigma_data != diffusion.sigma_data:
        raise ConfigError(
            f"sigma_data: got {cfg.sigma_data}, but {cfg.start} was trained with {diffusion.sigma_data}"
        )
    if isinstance(diffusion, EDM) and diffusion.boundary:
        raise ConfigError(
            f"start: {cfg.start} holds a consistency model, wants its teacher or another denoiser"
        )
    if isinstance(diffusion, DDPM) and _PREDICTIONS[diffusion.prediction] != cfg.prediction:
        raise ConfigError(
            f"prediction: got {cfg.prediction}, but {cfg.start} predicts {diffusion.prediction}"
        )
    return network, diffusion


def _networks(
    cfg: Config, network: UNet, shape: tuple[int, ...], classes: int | None, diffusion: DDPM | EDM
) -> Networks:
    schedule = _schedule(cfg, diffusion)
    sampler = GaussianSampler(Timed(network, schedule), schedule, shape)
    value: nn.Module
    energy: nn.Module | None = None
    if cfg.value_kind == "time_independent":
        value = TimeIndependent(ResNetEnergy(shape[0], cfg.energy_width, classes))
    else:
        value = ResNetValue(shape[0], cfg.steps, cfg.energy_width, classes)
        if cfg.value_kind == "separate":
            energy = ResNetEnergy(shape[0], cfg.energy_width, classes)
    return Networks(sampler, value, energy)


def _schedule(cfg: Config, diffusion: DDPM | EDM) -> Schedule:
    """The sampler's few steps."""
    if isinstance(diffusion, EDM):
        return schedules.edm(
            cfg.steps,
            sigma_max=cfg.sigma_max,
            sigma_min=cfg.sigma_min,
            rho=cfg.rho,
            stochastic_last=cfg.stochastic_last,
            eta=cfg.eta,
            sigma_data=diffusion.sigma_data,
            time_scale=diffusion.time_scale,
            min_std=cfg.min_std,
        )
    prediction = _PREDICTIONS[diffusion.prediction]
    if cfg.schedule == "ddim":
        return schedules.ddim(
            cfg.steps, eta=cfg.eta, betas=diffusion.betas, prediction=prediction, min_std=cfg.min_std
        )
    if not _are_linear(diffusion.betas):
        raise ConfigError("schedule: got fastdpm, which is for DDPM's linear betas; use schedule=ddim")
    return schedules.fastdpm(cfg.steps, kappa=cfg.eta, prediction=prediction, min_std=cfg.min_std)


def _are_linear(betas: Tensor) -> bool:
    usual = schedules.make_betas()
    return betas.shape == usual.shape and torch.allclose(betas, usual)


def _other_sampler(text: str, sampler: GaussianSampler, cfg: Config, diffusion: DDPM | EDM) -> Sampler:
    """By the name of a chain or solver and its steps, for the network as it was pretrained."""
    timed = sampler.network
    assert isinstance(timed, Timed)
    clipped = text.endswith(_CLIPPED)
    name, _, length = text.removesuffix(_CLIPPED).rpartition("-")
    if isinstance(diffusion, EDM):
        kinds, longest = ["edm", "edm-ancestral"], 1000
    else:
        kinds, longest = ["ddim", "ddpm", *["fastdpm"] * _are_linear(diffusion.betas)], len(diffusion.betas)
    kinds += SOLVERS
    if name not in kinds or not length.isdecimal() or not 1 < int(length) <= longest:
        wanted = " or ".join(f"{kind}-STEPS" for kind in kinds)
        raise ConfigError(f"chain: got {text!r}, wants {wanted}, of 2 to {longest} steps")
    if name in SOLVERS:
        return _solver(name, int(length), timed.network, cfg, diffusion, sampler.data_shape, clipped)
    chain = _chain(name, int(length), cfg, diffusion)
    network = Timed(timed.network, chain)
    if clipped:
        network = Clipped(timed.network, chain, *_prediction_of(diffusion))
    return GaussianSampler(network, chain, sampler.data_shape)


def _chain(name: str, steps: int, cfg: Config, diffusion: DDPM | EDM) -> Schedule:
    if isinstance(diffusion, EDM):
        bounds: dict[str, Any] = {"sigma_max": cfg.sigma_max, "sigma_min": cfg.sigma_min, "rho": cfg.rho}
        trained: dict[str, Any] = {"sigma_data": diffusion.sigma_data, "time_scale": diffusion.time_scale}
        return schedules.edm(steps, eta=float(name == "edm-ancestral"), **bounds, **trained)
    prediction = _PREDICTIONS[diffusion.prediction]
    if name == "fastdpm":
        return schedules.fastdpm(steps, prediction=prediction)
    own: dict[str, Any] = {"betas": diffusion.betas, "prediction": prediction}
    if name == "ddim":
        return schedules.ddim(steps, **own)
    return schedules.ddim(steps, eta=1.0, large_std=True, **own)


def _solver(
    name: str,
    steps: int,
    network: nn.Module,
    cfg: Config,
    diffusion: DDPM | EDM,
    data_shape: Sequence[int],
    clip: bool,
) -> SolverSampler:
    """On Karras et al.'s levels, whatever the diffusion's own."""
    prediction, sigma_data = _prediction_of(diffusion)
    if isinstance(diffusion, EDM):
        scale = diffusion.time_scale
        time, least, largest = (lambda sigma: scale * math.log(sigma) / 4), cfg.sigma_min, cfg.sigma_max
    else:
        time, least, largest = time_in_table(diffusion.betas)
    return SolverSampler(
        network,
        SOLVERS[name],
        karras_sigmas(steps, least, largest),
        time=time,
        prediction=prediction,
        sigma_data=sigma_data,
        preserving=isinstance(diffusion, DDPM),
        data_shape=data_shape,
        clip=clip,
    )


def _prediction_of(diffusion: DDPM | EDM) -> tuple[str, float]:
    """What a network tells, and the data's deviation, as in `schedules.from_levels`."""
    if isinstance(diffusion, EDM):
        return "edm", diffusion.sigma_data
    return _PREDICTIONS[diffusion.prediction], 0.5


def _pretrain(run: Run, cfg: Config, data: ImageData, networks: Networks, diffusion: DDPM | EDM) -> None:
    sampler = networks.sampler
    network = sampler.network.network
    assert isinstance(network, UNet)
    speed.prepare(cfg, sampler, network)
    pretrainer = _pretrainer(cfg, network, diffusion, sampler.memory_format, run.ranks)
    schedule = _schedule(cfg, diffusion)
    shown = GaussianSampler(Timed(pretrainer.averaged, schedule), schedule, data.shape).to(run.device)
    with _batches(cfg, data, "pretrain", run, cfg.pretrain_iterations) as batches:
        picture = _picture(cfg, shown, data)
        run.phase("pretrain", pretrainer, cfg.pretrain_iterations, batches, picture)
    sharding.load_(network, pretrainer.averaged.state_dict())


def _pretrainer(
    cfg: Config, network: nn.Module, diffusion: DDPM | EDM, memory_format: torch.memory_format, ranks: Ranks
) -> Pretrainer:
    """At all of the diffusion's levels, not the sampler's few."""
    sigma_data = 1.0
    if isinstance(diffusion, EDM):
        prediction, sigma_data = "edm", diffusion.sigma_data
        levels = lognormal_levels(
            mean=cfg.level_mean,
            std=cfg.level_std,
            sigma_data=sigma_data,
            time_scale=diffusion.time_scale,
        )
    else:
        prediction = _PREDICTIONS[diffusion.prediction]
        alpha_bar = (1 - diffusion.betas).cumprod(0)
        levels = uniform_levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return Pretrainer(
        network,
        levels,
        prediction=prediction,
        sigma_data=sigma_data,
        lr=cfg.pretrain_lr,
        warmup=cfg.pretrain_warmup,
        iterations=cfg.pretrain_iterations,
        seed=cfg.seed,
        ema_decay=cfg.pretrain_ema_decay,
        clip=cfg.pretrain_clip,
        ranks=ranks,
        settings=cfg,
        memory_format=memory_format,
    )


def _batches(cfg: Config, data: ImageData, phase: str, run: Run, iterations: int) -> Prefetcher:
    """iteration -> this rank's rows of the data, with labels where they count."""
    count, offset = run.rows

    def batch(iteration: int) -> Tensor | tuple[Tensor, ...]:
        rows: dict[str, Any] = {"offset": offset, "count": count, "flip": cfg.flip}
        images, labels = data.batch(iteration, cfg.batch_size, seed=cfg.seed, stream=phase, **rows)
        if not cfg.conditional:
            return images
        assert labels is not None
        return images, labels

    return Prefetcher(batch, run.device, iterations)


def _picture(cfg: Config, sampler: GaussianSampler, data: ImageData) -> Callable[[IO[bytes]], None] | None:
    """Draws samples of fixed noise and classes."""
    if cfg.shard:  # the first rank alone has no whole networks
        return None
    return lambda file: _draw_samples(file, cfg, sampler, data.classes)


def _draw_samples(file: IO[bytes] | Path, cfg: Config, sampler: Sampler, classes: int) -> None:
    key = noise.Draws(cfg.seed, "pictures", ["sample"], next(sampler.parameters()).device).at(0)["sample"]
    labels = torch.arange(_PICTURED, device=key.device) % classes if cfg.conditional else None
    plots.images(file, sampler.sample(_PICTURED, key, labels).cpu())


def _announce(cfg: Config, data: ImageData) -> None:
    """Says before a run which of its numbers it will lack."""
    final.announce_missing({"matplotlib": "curves.png"})
    if cfg.features is not None:
        if lacks := metrics.unmeasurable(_compared(cfg, data)):
            runlog.note(lacks)
        _test_images(cfg, data)


def _finish(run: Run, cfg: Config, data: ImageData, networks: Networks) -> dict[str, float]:
    """Pictures and metrics of a run that is over."""
    folder = run.directory
    final.attempt(
        "samples.png", lambda: _draw_samples(folder / "samples.png", cfg, networks.sampler, data.classes)
    )
    final.attempt("curves.png", lambda: plots.curves(folder / "curves.png", folder / "metrics.jsonl"))
    return _scores(cfg, data, networks.sampler, seed=cfg.seed)


def _scores(cfg: Config, data: ImageData, sampler: Sampler, *, seed: int) -> dict[str, float]:
    """Metrics against as many training images, and what as many test images score, where there are any; what
    cannot be computed is left out, and a line says so."""
    if cfg.features is None:
        return {}
    device, n = next(sampler.parameters()).device, _compared(cfg, data)
    extractor = features.load(cfg.features).to(device)
    options: dict[str, Any] = {"keep": min(n, 5000), "device": device, "cache": cfg.cache}

    def of_samples() -> dict[str, float]:
        reference = metrics.reference(data, extractor, n, **options)
        samples = metrics.statistics(_samples(cfg, sampler, n, seed), extractor, keep=options["keep"])
        return metrics.compare(samples, reference, extractor)

    numbers = final.numbers("metrics of samples", of_samples)
    if (test := _test_images(cfg, data)) is not None:
        numbers |= final.numbers(
            "metrics of test images", lambda: metrics.floor(data, test, extractor, n, **options)
        )
    return numbers


def _compared(cfg: Config, data: ImageData) -> int:
    """How many samples and images metrics compare."""
    return min(cfg.evaluate_n, len(data))


def _test_images(cfg: Config, data: ImageData) -> ImageData | None:
    """What as many true images score is computed from these; None, and a line, where they are missing."""
    what, n = "metrics of test images", _compared(cfg, data)
    test = final.attempt(what, lambda: _load_data(cfg, "test", data.scale))
    if test is not None and len(test) < n:
        runlog.note(f"{what}: left out, got {len(test)} test images, fewer than the {n} samples")
        return None
    return test


def _samples(cfg: Config, sampler: Sampler, n: int, seed: int) -> Iterator[Tensor]:
    """n samples in batches, as uint8; of classes at random."""
    classes = _classes_of(sampler)
    draws = noise.Draws(seed, "evaluate", ["sample", "labels"], next(sampler.parameters()).device).at(0)
    labels = None if classes is None else noise.randint(classes, n, draws["labels"])
    for first in range(0, n, cfg.sample_batch):
        count = min(cfg.sample_batch, n - first)
        part = None if labels is None else labels[first : first + count]
        samples = sampler.sample(count, draws["sample"], part, sample_offset=first)
        if not samples.isfinite().all():
            raise metrics.ImageMetricError(
                f"samples: some of rows {first} to {first + count - 1} are not finite"
            )
        yield data_images.to_uint8(samples)


def _classes_of(sampler: Sampler) -> int | None:
    return next(module.classes for module in sampler.modules() if isinstance(module, UNet))


def _save_model(path: Path, networks: Networks, cfg: Config, data: ImageData, diffusion: DDPM | EDM) -> None:
    network = networks.sampler.network.network
    assert isinstance(network, UNet)
    about = {
        "task": cfg.task,
        "data_shape": list(data.shape),
        "classes": _classes_of(networks.sampler),
        "scale": data.scale,
        "unet": json.loads(network.model.to_json_string()),
        "patch": network.patch,
    }
    if isinstance(diffusion, EDM):
        about |= {"prediction": "edm", **diffusion._asdict()}
    else:
        about |= {"prediction": _PREDICTIONS[diffusion.prediction]}
        about |= {} if _are_linear(diffusion.betas) else {"betas": diffusion.betas.tolist()}
    checkpoint.save_model(path, networks, about)


def _rebuilt(about: dict[str, Any]) -> tuple[UNet, DDPM | EDM]:
    """The network that `_save_model` tells of, its weights apart, and what it was trained for."""
    from diffusers import UNet2DModel

    # In evaluation mode, as diffusers gives the networks of its folders: dropout is for pretraining.
    network = UNet(UNet2DModel.from_config(about["unet"]), about.get("patch", 1)).eval()
    if about["prediction"] == "edm":
        return network, EDM(**{name: about[name] for name in EDM._fields if name in about})
    betas = torch.tensor(about["betas"], dtype=torch.float64) if "betas" in about else schedules.make_betas()
    return network, DDPM(betas, _KINDS[about["prediction"]])


def _of_run(directory: Path) -> tuple[UNet, DDPM | EDM, tuple[tuple[int, ...], int | None]]:
    """The network of a run's sampler, what it was trained for, and the shape and classes of its data."""
    tensors, about = checkpoint.load_model_state(directory / "model")
    if about.get("task") != "images":
        raise ConfigError(f"start: {directory} is a run of the task {about.get('task')}, wants images")
    prefix = "sampler.network.network."
    with checkpoint.fitting(directory):
        network, diffusion = _rebuilt(about)
        network.load_state_dict(
            {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        )
    return network, diffusion, (tuple(about["data_shape"]), about["classes"])
