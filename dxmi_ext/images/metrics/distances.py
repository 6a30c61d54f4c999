"""Metrics of generated images: Frechet distance (FID), kernel distance (KID), precision and recall.

Names include the network and the number of samples: ``fid10k`` is Inception's on 10,000 samples,
``fd_efflite0_10k`` EfficientNet-lite0's. Statistics are float64 sums over batches and ranks. Imports torch,
numpy and ``dxmi_ext``.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.runs import final
from dxmi_ext.engine.storage import files
from dxmi_ext.images.data.dataset import ImageData, default_cache, making
from dxmi_ext.images.metrics.features import Extractor

_CACHE_FORMAT = 1
_NEAREST = 3  # the neighbor that defines the radii for precision and recall


class ImageMetricError(UserError, ValueError):
    """Too few images, features of different sizes, or cached statistics of something else."""


class FeatureStatistics:
    """Statistics of the features of a set of images: their moments, and the first ``keep`` features.

    Args:
        keep: number of features to keep for kernel distance, precision and recall.
        sums: float64 [1 + D, 1 + D], the sum of f f^T over f = (1, features), which has count, sum and second
            moments. To combine ranks: ``dist.all_reduce(statistics.sums)``.
        features: kept features [n, D]. To combine ranks: concatenate.
    """

    def __init__(self, keep: int = 0, sums: Tensor | None = None, features: Tensor | None = None) -> None:
        self.keep = keep
        self._sums = sums
        self._kept = [] if features is None else [features]

    def update(self, features: Tensor) -> None:
        """Add the features [m, D] of a batch."""
        ones = features.new_ones(len(features), 1, dtype=torch.float64)
        rows = torch.cat([ones, features.double()], dim=1)
        product = rows.T @ rows
        self._sums = product if self._sums is None else self._sums + product
        if (missing := self.keep - sum(map(len, self._kept))) > 0:
            self._kept.append(features[:missing])

    @property
    def sums(self) -> Tensor:
        if self._sums is None:
            raise ImageMetricError("feature statistics: no images were given")
        return self._sums

    @property
    def features(self) -> Tensor:
        return torch.cat(self._kept) if self._kept else self.sums.new_empty(0, len(self.sums) - 1)

    @property
    def n(self) -> int:
        return round(float(self.sums[0, 0]))

    @property
    def mean(self) -> Tensor:
        """float64 [D]."""
        return self.sums[0, 1:] / self.n

    @property
    def covariance(self) -> Tensor:
        """float64 [D, D], unbiased.

        Raises:
            ImageMetricError: there are fewer than two images.
        """
        if self.n < 2:
            raise ImageMetricError(f"n must be >= 2 for a covariance of features, got {self.n}")
        return (self.sums[1:, 1:] - self.n * torch.outer(self.mean, self.mean)) / (self.n - 1)


def statistics(batches: Iterable[Tensor], *extractors: Extractor, keep: int = 0) -> list[FeatureStatistics]:
    """Statistics of batches of uint8 images [m, C, H, W], for each extractor."""
    results = [FeatureStatistics(keep) for _ in extractors]
    for images in batches:
        for result, extractor in zip(results, extractors, strict=True):
            result.update(extractor(images))
    return results


def reference(
    data: ImageData,
    extractor: Extractor,
    n: int | None = None,
    *,
    keep: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    cache: Path | str | None = None,
) -> FeatureStatistics:
    """Statistics of n images of a data set, cached on disk.

    Args:
        n: number of images, a fixed random subset; None: all.
        keep: see FeatureStatistics.
        cache: folder of the cache, by default that of decoded images. An entry depends on the images, the
            extractor's name and weights, n and keep; it may be deleted.

    Returns:
        Statistics on the CPU.

    Raises:
        ImageMetricError: n is larger than the data set, or a cache entry has other statistics.
    """
    n = len(data) if n is None else n
    if n < 2:
        raise ImageMetricError(f"n must be >= 2 for statistics of features, got {n}")
    if n > len(data):
        raise ImageMetricError(f"n must be <= {len(data)}, the number of images, got {n}")
    belongs = {"format": _CACHE_FORMAT, "images": data.fingerprint, "of": len(data), "n": n, "keep": keep}
    belongs |= {"extractor": extractor.identity}
    digest = hashlib.blake2b(json.dumps(belongs).encode(), digest_size=16).hexdigest()
    entry = (Path(cache).expanduser() if cache is not None else default_cache()) / f"features-{digest}"
    with making(entry):
        if (found := _read(entry, belongs)) is not None:
            return found
        batches = _batches(data, n, batch_size, device)
        (computed,) = statistics(batches, extractor.to(device), keep=keep)
        sums, features = computed.sums.cpu(), computed.features.cpu()
        with files.folder(entry, files.ANYTHING) as folder:  # may replace a damaged one
            np.savez(folder / "statistics.npz", sums=sums.numpy(), features=features.numpy())
            (folder / "about.json").write_text(json.dumps(belongs))
    return FeatureStatistics(keep, sums, features)


def compare(
    samples: FeatureStatistics, reference: FeatureStatistics, extractor: Extractor
) -> dict[str, float]:
    """All metrics of samples by name; kernel distance, precision and recall only if features were kept.

    Returns:
        For Inception fidN, kidN (mean over subsets; standard deviation kidN_std), precision_inception_N,
        recall_inception_N; for other networks fd_NAME_N, kd_NAME_N etc. N is the number of samples: all for
        the Frechet distance, the kept ones for the others. Metrics that cannot be computed are skipped, with
        a note.
    """
    got, expected = len(samples.mean), len(reference.mean)
    if got != expected:
        raise ImageMetricError(f"samples must have {expected} features, as the reference has, got {got}")

    def moments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return samples.mean, samples.covariance, reference.mean, reference.covariance

    network, fake, real = extractor.name, samples.features, reference.features.to(samples.features)
    fd = metric_name("fd", network, samples.n)
    result = final.numbers(fd, lambda: {fd: frechet_distance(*moments())})
    if len(fake) and len(real):
        kd = metric_name("kd", network, len(fake))
        kernel = (kd, f"{kd}_std")
        result |= final.numbers(kd, lambda: dict(zip(kernel, kernel_distance(real, fake), strict=True)))
        pair = [metric_name(kind, network, len(fake)) for kind in ("precision", "recall")]
        result |= final.numbers(
            " and ".join(pair), lambda: dict(zip(pair, precision_recall(real, fake), strict=True))
        )
    return result


def distance_to_test(
    samples: FeatureStatistics, test: FeatureStatistics, extractor: Extractor
) -> dict[str, float]:
    """The Frechet distance to test images, with suffix _test. Copying training images does not improve it."""
    name = metric_name("fd", extractor.name, samples.n) + "_test"
    moments = samples.mean, samples.covariance, test.mean, test.covariance
    return final.numbers(name, lambda: {name: frechet_distance(*moments)})


def unmeasurable(n: int) -> str | None:
    """A note on the metrics that require more than n images; None if there are none."""
    if n < 2:
        return f"metrics of samples: will be skipped, they require >= 2 images, got {n}"
    if n <= _NEAREST:
        return f"precision and recall: will be skipped, they require > {_NEAREST} images, got {n}"
    return None


def floor(
    train: ImageData,
    test: ImageData,
    extractor: Extractor,
    n: int,
    *,
    keep: int = 0,
    batch_size: int = 250,
    device: torch.device | str = "cpu",
    cache: Path | str | None = None,
) -> dict[str, float]:
    """Scores of n real images: ``compare`` of n test images with n training images, with suffix _floor.

    Distances are biased for finite n, so a sampler's score should be compared with these.
    """
    options: Any = {"keep": keep, "batch_size": batch_size, "device": device, "cache": cache}
    other, base = (reference(data, extractor, n, **options) for data in (test, train))
    return {f"{name}_floor": value for name, value in compare(other, base, extractor).items()}


def metric_name(kind: str, network: str, n: int) -> str:
    """fid10k and kid10k for Inception's fd and kd; otherwise kind_network_10k."""
    count = f"{n // 1000}k" if n % 1000 == 0 and n else str(n)
    if network == "inception" and kind in ("fd", "kd"):
        return f"{kind[0]}id{count}"
    return f"{kind}_{network}_{count}"


def frechet_distance(mean: Tensor, covariance: Tensor, mean_: Tensor, covariance_: Tensor) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^1/2) of two Gaussians (Heusel et al. 2017), in float64.

    S S' has the eigenvalues of the symmetric R S' R with R = S^1/2, which is stable for singular
    covariances; eigenvalues, and a distance, below 0 by rounding are set to 0.

    Args:
        mean, covariance, mean_, covariance_: [D] and [D, D] of the two Gaussians.
    """
    mean, covariance, mean_, covariance_ = (
        x.to(mean.device, torch.float64) for x in (mean, covariance, mean_, covariance_)
    )
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ covariance_ @ root).clamp(min=0).sqrt().sum()
    distance = (mean - mean_).square().sum() + covariance.trace() + covariance_.trace() - 2 * product
    return float(distance.clamp(min=0))


def kernel_distance(
    real: Tensor, fake: Tensor, *, subsets: int = 100, subset_size: int = 1000
) -> tuple[float, float]:
    """Squared maximum mean discrepancy under the kernel (x . y / D + 1)^3 (KID, Binkowski et al. 2018).

    Args:
        real, fake: [n, D], [m, D].
        subsets, subset_size: number and size of the random subsets over which the unbiased estimate is
            averaged; the size is at most that of the smaller set.

    Returns:
        Mean and standard deviation over subsets.
    """
    size = min(subset_size, len(real), len(fake))
    if size < 2:
        raise ImageMetricError(
            f"kernel distance: real, fake must have >= 2 rows, got {len(real)}, {len(fake)}"
        )
    generator = torch.Generator().manual_seed(0)

    def subset(features: Tensor) -> Tensor:
        rows = torch.randperm(len(features), generator=generator)[:size]
        return features[rows.to(features.device)].double()

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1).pow(3)

    def within(x: Tensor) -> Tensor:
        gram = kernel(x, x)
        return (gram.sum() - gram.trace()) / (size * (size - 1))

    estimates = []
    for _ in range(subsets):
        x, y = subset(real), subset(fake)
        estimates.append(within(x) + within(y) - 2 * kernel(x, y).mean())
    values = torch.stack(estimates)
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(real: Tensor, fake: Tensor, *, chunk: int = 1024) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019), in float64.

    A set's manifold is the union of balls around its features, with the distance to the third nearest
    neighbor as radius. Precision is the share of fake features in the real manifold; recall is the share of
    real features in the fake manifold.

    Args:
        real, fake: [n, D], [m, D]; n, m > 3.
        chunk: number of rows of the distance matrix at a time.
    """
    if min(len(real), len(fake)) <= _NEAREST:
        raise ImageMetricError(
            f"precision and recall: real, fake must have > {_NEAREST} rows, got {len(real)}, {len(fake)}"
        )
    real, fake = real.double(), fake.double()

    def radii(x: Tensor) -> Tensor:  # the nearest is x itself
        near = [torch.cdist(rows, x).topk(_NEAREST + 1, largest=False).values for rows in x.split(chunk)]
        return torch.cat(near)[:, _NEAREST]

    def share(x: Tensor, manifold: Tensor) -> float:
        radius = radii(manifold)
        inside = [(torch.cdist(rows, manifold) <= radius).any(dim=1) for rows in x.split(chunk)]
        return float(torch.cat(inside).double().mean())

    return share(fake, real), share(real, fake)


def nearest(samples: Tensor, images: np.ndarray, k: int, *, chunk: int = 4096) -> np.ndarray:
    """Indices of the k images nearest to each sample by pixel distance, nearest first, int64 [m, k].

    Args:
        samples: uint8 [m, C, H, W].
        images: uint8 [n, C, H, W], n >= k.
        chunk: number of images to compare at a time.
    """
    x, best = samples.flatten(1).float(), torch.full((len(samples), k), math.inf)
    rows = torch.zeros(len(samples), k, dtype=torch.int64)
    for first in range(0, len(images), chunk):
        part = torch.from_numpy(np.array(images[first : first + chunk])).flatten(1).float()
        found = torch.arange(first, first + len(part)).expand(len(x), -1)
        best, order = torch.cat((best, torch.cdist(x, part)), dim=1).topk(k, largest=False)
        rows = torch.cat((rows, found), dim=1).gather(1, order)
    return rows.numpy()


def _batches(data: ImageData, n: int, size: int, device: torch.device | str) -> Iterator[Tensor]:
    """n uint8 images in a fixed order with mixed classes."""
    for i in range(-(-n // size)):
        count = min(size, n - i * size)
        yield data.batch(i, size, count=count, stream="metrics", device=device, dtype=torch.uint8)[0]


def _read(entry: Path, belongs: dict[str, object]) -> FeatureStatistics | None:
    """The statistics in a cache entry; None if it is missing or damaged."""
    try:
        about = json.loads((entry / "about.json").read_text())
        with np.load(entry / "statistics.npz") as arrays:
            sums, features = (torch.from_numpy(arrays[name]) for name in ("sums", "features"))
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    if about != belongs:
        raise ImageMetricError(f"{entry}: expected statistics of {belongs}, got {about}; delete it")
    return FeatureStatistics(int(about["keep"]), sums, features)
