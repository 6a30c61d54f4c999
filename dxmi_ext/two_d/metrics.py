"""Metrics for 2D data: sliced Wasserstein distance and AUROC of the energy (DxMI, Table 1), entropy and
coverage of samples, and the divergence of the energy from the data.

Imports torch and numpy; scikit-learn (extra ``train``) is imported where used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dxmi_ext.engine.runs import final

_TINY = float(np.finfo(np.float32).tiny)

Draws = Callable[[int, int], Tensor]
"""(n, draw) -> [n, 2]; draws 0, 1, 2, ... are independent."""


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int = 1000, seed: int = 0) -> float:
    """Sliced 2-Wasserstein distance (not squared) of two sets of the same size.

    Args:
        x, y: points [n, D]. On a line, the optimal transport of n points to n others keeps their order.
        projections: number of random directions.
    """
    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {[*x.shape]}, got {[*y.shape]}")
    random = np.random.RandomState(seed % 2**32)  # 32 bits at most
    directions = random.normal(size=(x.shape[1], projections))
    directions /= np.linalg.norm(directions, axis=0)
    points, squared = (_numpy(x).T, _numpy(y).T), 0.0
    for i in range(0, projections, 20):  # blocks that fit the cache
        ordered = [np.sort(directions[:, i : i + 20].T @ each, axis=1) for each in points]
        squared += np.square(ordered[0] - ordered[1]).mean(1).sum()
    return math.sqrt(squared / projections)


def energy_auroc(energy_data: Tensor, energy_uniform: Tensor) -> float:
    """AUROC of the energy as a classifier of data against uniform points: 1 is perfect, .5 is chance.

    Args:
        energy_data, energy_uniform: energies [n], [m].

    Raises:
        ValueError: an energy is not finite.
    """
    data, uniform = np.sort(_numpy(energy_data)), _numpy(energy_uniform)
    if not (np.isfinite(data).all() and np.isfinite(uniform).all()):
        raise ValueError("energies must be finite to be ranked")
    lower, not_higher = (np.searchsorted(data, uniform, side) for side in ("left", "right"))
    return float((lower + not_higher).mean() / (2 * len(data)))  # equal energies count half


def entropy_excess(samples: Tensor, data: Tensor) -> float:
    """H(samples) - H(data) in nats, from distances to fifth nearest neighbors (Kozachenko & Leonenko 1987).

    Args:
        samples, data: [n, D]; with the same n, the other terms of the estimate cancel.
    """
    if samples.shape != data.shape:
        raise ValueError(f"samples must have the shape of data, {[*data.shape]}, got {[*samples.shape]}")
    if not (distances := _neighbor_distances(_numpy(data), 0)).all():
        raise ValueError("data must not have more than five equal points")
    logs = [np.log(each).mean() for each in (_neighbor_distances(_numpy(samples)), distances)]
    return float(samples.shape[1] * (logs[0] - logs[1]))


def coverage(samples: Tensor, data: Tensor) -> float:
    """Share of data points with a sample within the distance of their fifth nearest neighbor in the data
    (Naeem et al. 2020); 1 - 2^-5 for fresh data.

    Args:
        samples, data: [n, D], [m, D].
    """
    from sklearn.neighbors import NearestNeighbors

    points = _numpy(data)
    nearest, _ = NearestNeighbors(n_neighbors=1).fit(_numpy(samples)).kneighbors(points)
    return float((nearest[:, 0] <= _neighbor_distances(points)).mean())


def energy_kl(
    energy_fn: Callable[[Tensor], Tensor],
    log_density_fn: Callable[[Tensor], Tensor],
    temperature: float,
    *,
    device: torch.device | str = "cpu",
) -> float:
    """KL(p || q), in nats, of the data's density p and q = exp(-E / temperature) / Z.

    Both are truncated to [-4, 4]^2 and normalized there, on the midpoints of 200 x 200 cells. This
    direction, which training minimizes, is finite where p is 0.

    Args:
        energy_fn: float32 [n, 2] -> [n].
        log_density_fn: log p, [n, 2] -> [n]; -inf where p is 0.
        temperature: temperature > 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    line = (torch.arange(200, device=device) + 0.5) * (8 / 200) - 4
    cells = torch.cartesian_prod(line, line)
    log_p = log_density_fn(cells).double().log_softmax(0)
    log_q = (-energy_fn(cells).double() / temperature).log_softmax(0)
    inside = log_p > -math.inf
    return float((log_p[inside].exp() * (log_p - log_q)[inside]).sum())


def evaluate(
    sample_fn: Draws,
    data_fn: Draws,
    energy_fn: Callable[[Tensor], Tensor],
    *,
    n: int = 10_000,
    box: tuple[Any, Any] = (-4, 4),
    repeats: int = 5,
    projections: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Evaluate a sampler and an energy by the protocol of DxMI, Table 1: means and standard deviations over
    samplings.

    Args:
        sample_fn, data_fn: draw fresh samples and fresh data. Of a file's points, even draws are held out
            and odd ones are training points, so that the floor is that of the training points.
        energy_fn: [n, 2] -> [n].
        n: number of points of a sampling.
        box: lower and upper corners of the box of uniform points, numbers or [2].

    Returns:
        sliced_wasserstein(_std): samples against data. sliced_wasserstein_floor(_std): data against other
        data, the score of a perfect sampler. auroc(_std): energies of data against uniform points on
        the box. entropy_excess, coverage: samples against data. Metrics that cannot be computed are
        skipped, with a note.
    """
    found: dict[str, list[float]] = {}
    left_out: set[str] = set()
    for repeat in range(repeats):
        data, other = data_fn(n, 2 * repeat), data_fn(n, 2 * repeat + 1)
        random = np.random.default_rng([seed, repeat])
        uniform = torch.from_numpy(random.uniform(*box, size=(n, 2))).to(data)
        slices = {"projections": projections, "seed": seed + repeat}
        samples = sample_fn(n, repeat)
        measures = {
            "sliced_wasserstein": partial(sliced_wasserstein, samples, data, **slices),
            "sliced_wasserstein_floor": partial(sliced_wasserstein, other, data, **slices),
            "auroc": partial(_auroc, energy_fn, data, uniform),
            "entropy_excess": partial(entropy_excess, samples, data),
            "coverage": partial(coverage, samples, data),
        }
        for name in [name for name in measures if name not in left_out]:
            if (value := final.number(name, measures[name])) is None:
                left_out.add(name)
            else:
                found.setdefault(name, []).append(value)
    numbers: dict[str, float] = {}
    for name in [name for name in found if name not in left_out]:
        numbers[name] = float(np.mean(found[name]))
        if name in ("sliced_wasserstein", "sliced_wasserstein_floor", "auroc"):
            numbers[f"{name}_std"] = float(np.std(found[name]))
    return numbers


def _auroc(energy_fn: Callable[[Tensor], Tensor], data: Tensor, uniform: Tensor) -> float:
    return energy_auroc(energy_fn(data), energy_fn(uniform))


def _neighbor_distances(points: np.ndarray, minimum: float = _TINY) -> np.ndarray:
    """Distances [n] of points [n, D] to their fifth nearest neighbor, with a minimum."""
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=6).fit(points).kneighbors(points)  # the first is itself
    return distances[:, 5].clip(min=minimum)


def _numpy(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy()
