"""Mean AUROCs over splits, and differences of methods with intervals by a paired bootstrap. Imports numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

_RESAMPLINGS = 1000

Scores = dict[str, dict[str, list[np.ndarray]]]
"""Split -> method -> scores [m] of each seed; ``anomalous`` among the methods."""


def of(scores: Scores) -> dict[str, Any]:
    """The mean AUROC over splits and seeds of each method, and differences with their 95 % intervals.

    The intervals come from a bootstrap over test images, with the same resamples in every split and for every
    method.

    Args:
        scores: scores of the same test images in every split.
    """
    first = next(iter(scores.values()))
    m = len(first["anomalous"][0])
    weights = np.concatenate(
        (np.ones((1, m)), np.random.default_rng(0).multinomial(m, np.full(m, 1 / m), _RESAMPLINGS))
    ).astype(np.float32)
    names = [name for name in first if name != "anomalous" and all(name in each for each in scores.values())]
    means: dict[str, np.ndarray] = {}
    for name in names:
        every = [
            aurocs(one, of_split["anomalous"][0], weights)
            for of_split in scores.values()
            for one in of_split[name]
        ]
        means[name] = np.mean(every, axis=0)
    ours = [name for name in names if name.startswith("dxmi")]
    results: dict[str, Any] = {
        "mean": {name: round(float(value[0]), 4) for name, value in means.items()},
        "gains": {},
    }
    for mine in ours:
        for other in (name for name in names if name not in ours):
            difference = means[mine] - means[other]
            low, high = np.quantile(difference[1:], (0.025, 0.975))
            results["gains"].setdefault(mine, {})[other] = [
                round(float(x), 4) for x in (difference[0], low, high)
            ]
    return results


def aurocs(scores: np.ndarray, anomalous: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """AUROC for each weighting of the images, [r]; equal scores count by their order.

    Args:
        scores: [m].
        anomalous: bool [m].
        weights: float32 [r, m].
    """
    order, found = np.argsort(scores, kind="stable"), []
    odd = anomalous[order]
    for chunk in np.array_split(weights, max(1, len(weights) // 50)):
        ranked = chunk[:, order]
        good, bad = (np.where(which, ranked, 0) for which in (~odd, odd))
        below = np.cumsum(good, axis=1, dtype=np.float64)
        found.append((bad * below).sum(1) / bad.sum(1) / below[:, -1])
    return np.concatenate(found)
