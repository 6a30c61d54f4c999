"""Evaluation of an image run: metrics against training and test images, and grids of samples.

Imports torch, the engine and the method; Pillow and the feature network where they are used.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from dxmi_ext.engine.output import plots, runlog
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data import dataset
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.data.pixels import Scale
from dxmi_ext.images.metrics import classifier, distances, features
from dxmi_ext.images.metrics.features import Extractor
from dxmi_ext.images.model import Sampler, classes_of
from dxmi_ext.images.settings import Config
from dxmi_ext.method import noise
from dxmi_ext.method.networks import Networks

_PICTURED = 64
_COMPARED, _NEIGHBORS = 8, 7


def table(numbers: dict[str, float]) -> str:
    """Metrics, one per line, with the scores of the same number of test images."""
    rows = {name: value for name, value in numbers.items() if not name.endswith(("_floor", "_std"))}
    lines = [f"{'':32}{'this run':>10}{'test images':>14}"]
    for name, value in rows.items():
        floor = numbers.get(f"{name}_floor")
        lines.append(f"{name:32}{value:10.4g}{'' if floor is None else f'{floor:14.4g}'}")
    return "\n".join(lines)


def announce(cfg: Config, data: ImageData) -> None:
    """Notes before a run which metrics it will skip."""
    final.announce_missing({"matplotlib": "curves.png"})
    if cfg.evaluation.features is not None:
        if lacks := distances.unmeasurable(compared(cfg, data)):
            runlog.note(lacks)
        test_images(cfg, data)


def finish(run: Run, cfg: Config, data: ImageData, networks: Networks) -> dict[str, float]:
    """Pictures and metrics of a finished run."""
    folder = run.directory
    final.attempt(
        "samples.png", lambda: draw_samples(folder / "samples.png", cfg, networks.sampler, data.classes)
    )
    final.attempt("curves.png", lambda: plots.curves(folder / "curves.png", folder / "metrics.jsonl"))
    sampler, numbers = networks.sampler, dict[str, float]()
    for steps in cfg.chain.all_steps:
        if steps != cfg.chain.steps:
            sampler.use(steps)
            found = scores(cfg, data, sampler, seed=cfg.run.seed, of_test_images=False)
            numbers |= {f"{name}_t{steps}": value for name, value in found.items()}
    sampler.use(cfg.chain.steps)
    return scores(cfg, data, sampler, seed=cfg.run.seed) | numbers


def scores(
    cfg: Config, data: ImageData, sampler: Sampler, *, seed: int, of_test_images: bool = True
) -> dict[str, float]:
    """Metrics against the same number of training images, and the scores of test images if there are any.
    Metrics that cannot be computed are skipped, with a note."""
    if cfg.evaluation.features is None:
        return {}
    device, n = next(sampler.parameters()).device, compared(cfg, data)
    networks = [network.to(device) for network in extractors(cfg, data)]
    options: dict[str, Any] = {"keep": min(n, 5000), "device": device, "cache": cfg.source.cache}

    test = test_images(cfg, data)

    def of_samples() -> dict[str, float]:
        found: dict[str, float] = {}
        drawn = distances.statistics(_samples(cfg, data, sampler, n, seed), *networks, keep=options["keep"])
        for samples, network in zip(drawn, networks, strict=True):
            found |= distances.compare(samples, distances.reference(data, network, n, **options), network)
            if test is not None:
                true = distances.reference(test, network, n, **options)
                found |= distances.distance_to_test(samples, true, network)
        return found

    def of_images(test: ImageData) -> dict[str, float]:
        return {k: v for each in networks for k, v in distances.floor(data, test, each, n, **options).items()}

    numbers = final.numbers("metrics of samples", of_samples)
    if test is not None and of_test_images:
        numbers |= final.numbers("metrics of test images", lambda: of_images(test))
    return numbers


def extractors(cfg: Config, data: ImageData) -> list[Extractor]:
    """The feature extractors of the metrics; a classifier is trained unless it is cached.

    Raises:
        FeatureError: an extractor is missing, or the data have no classes for the classifier.
    """
    cache = cfg.source.cache
    return [
        classifier.extractor(data, cache=cache) if name == classifier.NAME else features.load(name)
        for name in _features(cfg)
    ]


def check_extractors(cfg: Config, data: ImageData) -> None:
    """Checks what `extractors` requires, without training a classifier, for a dry run."""
    for name in _features(cfg):
        classifier.check(data) if name == classifier.NAME else features.load(name)


def _features(cfg: Config) -> list[str]:
    names = cfg.evaluation.features
    return [] if names is None else [name.strip() for name in names.split(",")]


def compared(cfg: Config, data: ImageData) -> int:
    """Number of samples and images for the metrics."""
    return min(cfg.evaluation.evaluate_n, len(data))


def test_images(cfg: Config, data: ImageData) -> ImageData | None:
    """The test images, for the scores of real images; None with a note if they are missing."""
    what, n = "metrics of test images", compared(cfg, data)
    test = final.attempt(what, lambda: load_data(cfg, "test", data.scale))
    if test is not None and len(test) < n:
        runlog.note(f"{what}: skipped, got {len(test)} test images, fewer than the {n} samples")
        return None
    return test


def _samples(cfg: Config, data: ImageData, sampler: Sampler, n: int, seed: int) -> Iterator[Tensor]:
    """n samples in batches, as uint8; of a conditional sampler, with the labels of random training images."""
    draws = noise.Draws(seed, "evaluate", ["sample", "labels"], next(sampler.parameters()).device).at(0)
    labels = None
    if classes_of(sampler) is not None:
        assert data.labels is not None
        rows = noise.randint(len(data), n, draws["labels"])
        labels = torch.from_numpy(data.labels[rows.cpu().numpy()]).to(rows.device)
    for first in range(0, n, cfg.evaluation.sample_batch):
        count = min(cfg.evaluation.sample_batch, n - first)
        part = None if labels is None else labels[first : first + count]
        samples = sampler.sample(count, draws["sample"], part, sample_offset=first)
        if not samples.isfinite().all():
            raise distances.ImageMetricError(
                f"samples: some of rows {first} to {first + count - 1} are not finite"
            )
        yield plots.to_uint8(samples)


def draw_samples(file: IO[bytes] | Path, cfg: Config, sampler: Sampler, classes: int) -> None:
    key = noise.Draws(cfg.run.seed, "pictures", ["sample"], next(sampler.parameters()).device).at(0)["sample"]
    labels = torch.arange(_PICTURED, device=key.device) % classes if cfg.source.conditional else None
    plots.images(file, sampler.sample(_PICTURED, key, labels).cpu())


def draw_neighbors(file: Path, cfg: Config, sampler: Sampler, data: ImageData) -> None:
    """Draws samples with their nearest training images, to reveal copies."""
    samples = next(_samples(cfg, data, sampler, _COMPARED, cfg.run.seed)).cpu()
    count = min(_NEIGHBORS, len(data))
    nearest = torch.from_numpy(data.images[distances.nearest(samples, data.images, count).flatten()])
    rows = torch.cat((samples[:, None], nearest.view(len(samples), count, *data.shape)), dim=1)
    plots.images(file, rows.flatten(0, 1), columns=1 + count)


def load_data(cfg: Config, split: str = "train", scale: Scale | None = None) -> ImageData:
    return dataset.load(
        path_of(cfg), split=split, size=cfg.source.image_size, cache=cfg.source.cache, scale=scale
    )


def path_of(cfg: Config) -> str:
    if cfg.source.data is None:
        raise ConfigError("data must be the path of images, got null; see `dxmi train RECIPE --help`")
    return cfg.source.data
