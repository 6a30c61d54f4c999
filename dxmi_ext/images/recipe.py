"""Image recipes: few-step fine-tuning of a diffusion model, which is pretrained here or given (DxMI, sec. 5).

Imports torch, the engine and the method; diffusers, Pillow and the feature network where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine import course
from dxmi_ext.engine.compute import execution, sharding
from dxmi_ext.engine.compute.prefetch import Prefetcher
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.course import Finish
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs.identity import Fingerprints, changed, data_of, fingerprint
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.images import chains, model
from dxmi_ext.images.data import overview
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.data.overview import Overview
from dxmi_ext.images.data.pixels import Scale
from dxmi_ext.images.evaluation import (
    announce,
    check_extractors,
    draw_neighbors,
    draw_samples,
    extractors,
    finish,
    load_data,
    path_of,
    scores,
    table,
    test_images,
)
from dxmi_ext.images.model import PREDICTIONS, Sampler, classes_of, networks_of, schedule_of
from dxmi_ext.images.networks.encoder import load_encoders
from dxmi_ext.images.networks.pretrained import DDPM, EDM
from dxmi_ext.images.networks.unet import UNet
from dxmi_ext.images.separation import separation
from dxmi_ext.images.settings import NO_START, Config, EvaluateSettings
from dxmi_ext.method import generate
from dxmi_ext.method.denoising import Pretrainer, lognormal_levels, uniform_levels
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler, Timed
from dxmi_ext.method.trainer import DxMITrainer


def train(cfg: Config, ranks: Ranks | None = None) -> dict[str, Any]:
    """Runs the recipe and returns the summary, on the first rank."""
    run = Run(cfg, ranks, _fingerprints(cfg))

    def learn() -> Finish:
        resolved, data, networks, diffusion = _prepare(run, cfg)
        if run.ranks.first:
            announce(resolved, data)
        if resolved.run.pretrained and resolved.networks.start is None:
            if run.ranks.first and cfg.networks.start is None and "pretrain" not in run.past:
                runlog.note(
                    "this run pretrains a network of its own for "
                    f"{cfg.run.pretrain_iterations:,} iterations; start= names a pretrained one instead"
                )
            _pretrain(run, resolved, data, networks, diffusion)
        averaged = run.ranks.whole(_train(run, resolved, data, networks))

        def finish_run() -> tuple[dict[str, Any], str]:
            if resolved.chain.denoised:
                model.denoise_(averaged.sampler)
            model.save(run.directory / "model", averaged, data, diffusion)
            numbers = finish(run, resolved, data, averaged)
            return numbers, table(numbers)

        return finish_run

    return course.train(run, learn, "pictures", cfg.execution)


def pretrain(cfg: Config, ranks: Ranks | None = None) -> None:
    """Runs the pretraining alone; training with the same output or with it as ``start`` continues."""
    if cfg.networks.start not in (None, NO_START) or not cfg.run.pretrained:
        raise ConfigError(
            f"start must be none and pretrained true for pretraining alone, got {cfg.networks.start} and "
            f"{cfg.run.pretrained}"
        )
    run = Run(cfg, ranks, _fingerprints(cfg))

    def learn() -> Callable[[], None]:
        resolved, data, networks, diffusion = _prepare(run, cfg)
        _pretrain(run, resolved, data, networks, diffusion)
        whole = run.ranks.whole(networks)

        def save() -> None:
            model.save(run.directory / "model", whole, data, diffusion)
            draw_samples(run.directory / "samples.png", resolved, whole.sampler, data.classes)

        return save

    text = "pretrained, model/; `dxmi train` with start={directory} continues from it"
    course.pretrain(run, learn, text, cfg.execution)


def sample(
    directory: Path,
    rows: range,
    seed: int,
    batch_size: int | None,
    device: torch.device,
    **options: Any,
) -> Iterator[Batch]:
    """Samples [m, C, H, W] of a run's final sampler, about in [-1, 1]; see `generate.batches`."""
    _, networks = load(directory, device)
    classes = classes_of(networks.sampler)
    return generate.batches(networks, rows, seed, batch_size=batch_size, classes=classes, **options)


def evaluate(
    directory: Path, settings: EvaluateSettings, device: torch.device
) -> tuple[dict[str, float], str]:
    """The metrics of a run's final network, sampled in its few steps or by another chain.

    Raises:
        ConfigError: the data are not those of the run, the chain is unknown, or the sampler has no chain of
            this number of steps.
    """
    cfg, networks, diffusion = model.load(directory, device)
    cfg = cfg.replace(
        evaluate_n=settings.n or cfg.evaluation.evaluate_n, data=settings.data or cfg.source.data
    )
    if not Path(path_of(cfg)).exists():
        raise ConfigError(f"data: {path_of(cfg)} does not exist; data=PATH names another place")
    sampler: Sampler = networks.sampler
    if settings.steps is not None and settings.chain is not None:
        raise ConfigError(f"steps must be null with chain={settings.chain}, got {settings.steps}")
    if settings.steps is not None:
        generate.use_steps(networks.sampler, settings.steps)
    if settings.chain is not None:
        sampler = chains.named(settings.chain, networks.sampler, cfg, diffusion).to(device)
    _, about = checkpoint.load_model_state(directory / "model")
    data, known = load_data(cfg, scale=Scale.of(about.get("scale"))), data_of(directory)
    if settings.data is not None and not known:
        runlog.note(f"{directory} has no fingerprint of its data; {settings.data} is assumed to hold them")
    if changed(known, fingerprints_of(data)):
        raise ConfigError(
            f"data: {str(cfg.source.data)!r} must hold the images that {directory} was trained on, but has "
            "another fingerprint; data=PATH names another place"
        )
    if settings.picture is not None:
        draw_samples(Path(settings.picture), cfg, sampler, data.classes)
    if settings.neighbors is not None:
        draw_neighbors(Path(settings.neighbors), cfg, sampler, data)
    separated: dict[str, float] = {}
    if settings.against is not None:  # first, since it may be refused
        separated = _separation(cfg, settings, networks, data, device)
    numbers = scores(cfg, data, sampler, seed=settings.seed) | separated
    return numbers, table(numbers)


def _separation(
    cfg: Config, settings: EvaluateSettings, networks: Networks, data: ImageData, device: torch.device
) -> dict[str, float]:
    test = test_images(cfg, data)
    if test is None:
        raise ConfigError(f"against must be null where data={cfg.source.data} have no test images")
    assert settings.against is not None
    return separation(
        networks,
        test,
        settings.against,
        cfg.evaluation.evaluate_n,
        seed=settings.seed,
        device=device,
        size=cfg.source.image_size,
        cache=cfg.source.cache,
    )


def load(directory: Path, device: torch.device) -> tuple[Config, Networks]:
    """A run's settings and final networks.

    Raises:
        checkpoint.CheckpointError: they are missing or damaged.
    """
    cfg, networks, _ = model.load(directory, device)
    return cfg, networks


def read(cfg: Config) -> Overview:
    """The overview of the settings' data, before they are decoded.

    Raises:
        ConfigError: no data are given.
        ImageDataError: they cannot be read.
    """
    return overview.of_images(path_of(cfg))


def _prepare(run: Run, cfg: Config) -> tuple[Config, ImageData, Networks, DDPM | EDM]:
    """The settings with a resolved start, the data, the networks, and the diffusion of the sampler's network.
    Missing packages and files are reported here, before training."""
    if run.ranks.first:
        print(read(cfg).lines())
    data = load_data(cfg)
    classes = _classes(cfg, data)
    cfg = model.with_start(cfg, data.shape, classes)
    pretrains = cfg.run.pretrained and cfg.networks.start is None
    if pretrains and not cfg.run.pretrain_iterations and not cfg.run.dry_run:
        raise ConfigError(
            "start must be a network with pretrain_iterations=0 unless pretrained=false, got null"
        )
    if run.ranks.first:
        check_extractors(cfg, data) if cfg.run.dry_run else extractors(cfg, data)
    try:
        network, diffusion = model.network_of(cfg, data.shape, classes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.run.seed + 1)
            networks = networks_of(cfg, network, data.shape, classes, diffusion).to(run.device)
    except ValueError as error:  # from schedules and U-Nets, which name the setting
        raise error if isinstance(error, UserError) else ConfigError(str(error)) from error
    run.describe(networks)
    return cfg, data, networks, diffusion


def _fingerprints(cfg: Config) -> Callable[[str], Fingerprints]:
    """path -> fingerprints of the images there, as the run reads them."""
    return lambda path: fingerprints_of(load_data(cfg.replace(data=path)))


def fingerprints_of(data: ImageData) -> Fingerprints:
    """The fingerprints of a run's training images."""
    return {"train": fingerprint(data.fingerprint, data.labels, data.class_names)}


def _classes(cfg: Config, data: ImageData) -> int | None:
    if not cfg.source.conditional:
        return None
    if not data.classes:
        raise ConfigError(
            f"conditional must be false for images without classes ({cfg.source.data}), got true"
        )
    return data.classes


def _train(run: Run, cfg: Config, data: ImageData, networks: Networks) -> Networks:
    """Trains by DxMI and returns the averaged networks."""
    trainer = DxMITrainer(
        networks,
        cfg.algorithm,
        iterations=cfg.run.iterations,
        seed=cfg.run.seed,
        ranks=run.ranks,
        langevin=cfg.langevin,
        execution=cfg.execution,
    )
    with _batches(cfg, data, "dxmi", run, cfg.run.iterations) as batches:
        picture = _picture(cfg, trainer.averaged.sampler, data)
        run.phase("dxmi", trainer, cfg.run.iterations, batches, picture)
    return trainer.averaged


def _pretrain(run: Run, cfg: Config, data: ImageData, networks: Networks, diffusion: DDPM | EDM) -> None:
    sampler = networks.sampler
    network = sampler.network.network
    assert isinstance(network, UNet)
    sampler.memory_format = execution.prepare(cfg.execution, network, data_shape=data.shape)
    pretrainer = _pretrainer(cfg, network, diffusion, sampler.memory_format, run.ranks)
    schedule = schedule_of(cfg, diffusion, cfg.chain.steps)
    shown = GaussianSampler(Timed(pretrainer.averaged, schedule), schedule, data.shape).to(run.device)
    with _batches(cfg, data, "pretrain", run, cfg.run.pretrain_iterations) as batches:
        picture = _picture(cfg, shown, data)
        run.phase("pretrain", pretrainer, cfg.run.pretrain_iterations, batches, picture)
    sharding.load_(network, pretrainer.averaged.state_dict())
    whole = run.ranks.whole(network)
    if run.ranks.first or whole is network:  # with sharding, the others load the encoders of the first rank
        load_encoders(networks, whole)


def _pretrainer(
    cfg: Config, network: nn.Module, diffusion: DDPM | EDM, memory_format: torch.memory_format, ranks: Ranks
) -> Pretrainer:
    """The pretrainer, on all levels of the diffusion rather than the sampler's few."""
    sigma_data = 1.0
    if isinstance(diffusion, EDM):
        prediction, sigma_data = "edm", diffusion.sigma_data
        levels = lognormal_levels(
            mean=cfg.pretraining.level_mean,
            std=cfg.pretraining.level_std,
            sigma_data=sigma_data,
            time_scale=diffusion.time_scale,
        )
    else:
        prediction = PREDICTIONS[diffusion.prediction]
        alpha_bar = (1 - diffusion.betas).cumprod(0)
        levels = uniform_levels(alpha_bar.sqrt(), (1 - alpha_bar).sqrt())
    return Pretrainer(
        network,
        levels,
        prediction=prediction,
        sigma_data=sigma_data,
        lr=cfg.pretraining.pretrain_lr,
        warmup=cfg.pretraining.pretrain_warmup,
        iterations=cfg.run.pretrain_iterations,
        seed=cfg.run.seed,
        ema_decay=cfg.pretraining.pretrain_ema_decay,
        clip=cfg.pretraining.pretrain_clip,
        ranks=ranks,
        execution=cfg.execution,
        memory_format=memory_format,
    )


def _batches(cfg: Config, data: ImageData, phase: str, run: Run, iterations: int) -> Prefetcher:
    """iteration -> this rank's rows of the data, with labels if conditional."""
    size = cfg.run.batch_size
    if phase == "pretrain":
        size = cfg.pretraining.pretrain_batch_size or size
    count, offset = run.ranks.rows(size)

    def batch(iteration: int) -> Tensor | tuple[Tensor, ...]:
        rows: dict[str, Any] = {"offset": offset, "count": count, "flip": cfg.source.flip}
        images, labels = data.batch(iteration, size, seed=cfg.run.seed, stream=phase, **rows)
        if not cfg.source.conditional:
            return images
        assert labels is not None
        return images, labels

    return Prefetcher(batch, run.device, iterations)


def _picture(cfg: Config, sampler: GaussianSampler, data: ImageData) -> Callable[[IO[bytes]], None] | None:
    """Draws samples of fixed noise and classes."""
    if cfg.run.shard:  # the first rank has only its shard
        return None
    return lambda file: draw_samples(file, cfg, sampler, data.classes)
