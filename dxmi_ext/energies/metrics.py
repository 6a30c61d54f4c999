"""Metrics of samples: Wasserstein distances, total variation, and modes.

Imports torch, numpy and ``dxmi_ext.ops``; scipy (which scikit-learn of the extra ``train`` brings) where it
is used.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies.targets import Target, distances

_BINS = 200  # bins of a histogram
_WITHIN = 4.0  # distance within which a sample belongs to a mode, in standard deviations
_SHARE = 0.1  # smallest share of its expected samples with which a mode counts as covered
_DIRECTIONS = 500  # directions of the sliced distance
_ALIGNED = 200  # samples that are compared after alignment; the time grows with the square
_ALIGNMENTS = 8  # random orientations from which an alignment starts
_ROUNDS = 3  # rounds of permutation and rotation


def wasserstein(x: Tensor, y: Tensor) -> float:
    """W2 (not squared) between two sets of points [n, D], by an optimal assignment. It is raw: particles are
    neither rotated nor permuted.

    Raises:
        ValueError: the sets differ in shape.
    """
    from scipy.optimize import linear_sum_assignment

    if x.shape != y.shape:
        raise ValueError(f"y must have the shape of x, {[*x.shape]}, got {[*y.shape]}")
    costs = torch.cdist(x.double(), y.double()).square().cpu().numpy()
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def sliced_wasserstein(x: Tensor, y: Tensor) -> float:
    """Sliced W2 (not squared) between two sets of points [n, D]: the root mean square, over fixed random
    directions, of the W2 between their projections."""
    directions = ops.normal((_DIRECTIONS, x.shape[1]), ops.noise_key(0), dtype=torch.float64).to(x.device)
    directions /= directions.norm(dim=1, keepdim=True)
    projected = [(points.double() @ directions.T).sort(0).values for points in (x, y)]
    return float((projected[0] - projected[1]).square().mean().sqrt())


def aligned_wasserstein(x: Tensor, y: Tensor, particles: int) -> float:
    """W2 (not squared) between two sets of configurations [n, D] of identical particles, where the distance
    of two configurations is the smallest over rotations, reflections and permutations.

    Each alignment is a local minimum, found by permutations and rotations in turn from a few random
    orientations, so that the result is an upper bound.
    """
    from scipy.optimize import linear_sum_assignment

    n, pairs = len(x), len(x) * len(y)
    first, second = (points.double().cpu().view(len(points), particles, -1) for points in (x, y))
    first, second = (points - points.mean(1, keepdim=True) for points in (first, second))
    a, b = first.repeat_interleave(len(y), 0), second.repeat(n, 1, 1)  # all pairs, [n * n, particles, d]
    sizes = a.square().sum((1, 2)) + b.square().sum((1, 2))
    dim, best = a.shape[2], torch.full((pairs,), math.inf, dtype=torch.float64)
    for start in range(_ALIGNMENTS):
        noise = ops.normal((pairs, dim, dim), ops.noise_key(0), timestep=start, dtype=torch.float64)
        rotation = torch.linalg.qr(noise).Q
        for _ in range(_ROUNDS):
            products = a @ (b @ rotation).transpose(1, 2)
            order = np.stack([linear_sum_assignment(each, maximize=True)[1] for each in products.numpy()])
            permuted = b.gather(1, torch.from_numpy(order)[:, :, None].expand_as(b))
            u, scale, v = torch.linalg.svd(permuted.transpose(1, 2) @ a)
            rotation = u @ v
            best = torch.minimum(best, sizes - 2 * scale.sum(1))
    costs = best.view(n, -1).clamp(min=0).numpy()
    return math.sqrt(costs[linear_sum_assignment(costs)].mean())


def total_variation(x: Tensor, y: Tensor, low: float, high: float, *, bins: int = _BINS) -> float:
    """Total variation distance between histograms of numbers [n] and [m]; numbers outside count in the first
    or last bin."""
    shares = []
    for values in (x, y):
        inside = values.detach().double().flatten().clamp(low, high).cpu().numpy()
        counts, _ = np.histogram(np.nan_to_num(inside, nan=high), bins, (low, high))
        shares.append(counts / counts.sum())
    return float(np.abs(shares[0] - shares[1]).sum() / 2)


def mode_counts(samples: Tensor, modes: Tensor, std: float) -> Tensor:
    """The number of samples [n, D] within 4 std of each mode [K, D], [K]; a sample counts for its nearest
    mode."""
    near = torch.cdist(samples.double(), modes.to(samples).double()).min(1)
    counted = near.indices[near.values <= _WITHIN * std]
    return torch.bincount(counted, minlength=len(modes))


def of_modes(samples: Tensor, target: Target) -> dict[str, float]:
    """modes: number of modes, of K equally likely ones, with at least a tenth of their expected samples;
    modes_true: K; mode_entropy: entropy of the samples over modes, divided by its maximum log K."""
    assert target.modes is not None
    counts, k = mode_counts(samples, target.modes, target.mode_std), len(target.modes)
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-300).log()).sum() / math.log(k)
    covered = counts >= _SHARE * len(samples) / k
    return {"modes": float(covered.sum()), "modes_true": float(k), "mode_entropy": float(entropy)}


def compare(samples: Tensor, data: Tensor, other: Tensor, target: Target) -> dict[str, float]:
    """Samples compared with samples of the target, all [n, D]; NAME_floor compares the target's samples with
    others of the target.

    Returns:
        w2; sliced_w2; energy_tvd, over 200 bins up to the .999 quantile of the data's energies, or in
        [-100, 100] for particles; for particles distance_tvd, over their distances, and aligned_w2, of the
        first 200 samples; for mixtures the metrics of `of_modes`.
    """
    numbers = {"w2": wasserstein(samples, data), "w2_floor": wasserstein(other, data)}
    numbers |= {"sliced_w2": sliced_wasserstein(samples, data)}
    numbers |= {"sliced_w2_floor": sliced_wasserstein(other, data)}
    energies = [target.energy(x) for x in (samples, data, other)]
    if target.particles is None:
        low, high = np.quantile(energies[1].double().cpu().numpy(), [0.0, 0.999])
    else:
        low, high = -100.0, 100.0
    numbers |= _variations("energy", energies, float(low), float(high))
    if target.particles is not None:
        lengths = [distances(x, target.particles) for x in (samples, data, other)]
        numbers |= _variations("distance", lengths, 0.0, 1.2 * float(lengths[1].max()))
        few, reference, others = (x[:_ALIGNED] for x in (samples, data, other))
        numbers["aligned_w2"] = aligned_wasserstein(few, reference, target.particles)
        numbers["aligned_w2_floor"] = aligned_wasserstein(others, reference, target.particles)
    return numbers | ({} if target.modes is None else of_modes(samples, target))


def _variations(name: str, values: list[Tensor], low: float, high: float) -> dict[str, float]:
    samples, data, other = values
    return {
        f"{name}_tvd": total_variation(samples, data, low, high),
        f"{name}_tvd_floor": total_variation(other, data, low, high),
    }
