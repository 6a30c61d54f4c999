"""A temperature that nobody has to choose: it follows the entropy of the data.

At DxMI's equilibrium samples and data have one distribution, so one entropy, whatever tau is; what training
reaches is near that for a range of tau. Below it the sampler gathers where the energy is low, above it
spreads beyond the data; within it the energy tells the more the larger tau is. So tau is taken so large that
the samples' entropy is a margin above the data's: the multiplier of that constraint, found by dual ascent.
Once the energy has learned, the margin goes, so that the samples end as spread as the data.
Imports torch and ``dxmi_ext.engine.ranks``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.engine.ranks import Ranks

_NEIGHBOUR = 3
_GROUP = 128
_LARGEST = 1000.0  # the factor stays within this and its inverse


class Temperature:
    """A factor of every tau.

    Args:
        rate: the factor grows by exp(rate) an iteration for each nat a dimension that samples lack.
        factor: a scalar on the device, to begin with; it is changed in place.
        ranks: whose rows are taken together, so that the factor is the same on all.
        margin: nats a dimension by which samples are to exceed the data, until half of the run is done; from
            there it falls to 0.
    """

    def __init__(
        self, rate: float, factor: Tensor, ranks: Ranks | None = None, *, margin: float = 0.0
    ) -> None:
        self.rate, self.factor, self.ranks = rate, factor, ranks or Ranks()
        self._margin, self._wanted = margin, factor.new_tensor(margin)

    def at(self, done: float) -> None:
        """Sets the margin for a place in the run: 0 at its start, 1 at its end."""
        self._wanted.fill_(self._margin * min(1.0, 2 * (1 - done)))

    @torch.no_grad()
    def update(self, data: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """One step of dual ascent, in place. Rows that are not finite change nothing.

        Args:
            data, samples: this rank's rows [N, *], as many of both.

        Returns:
            What to log.
        """
        gap = entropy_gap(self.ranks.gather(data), self.ranks.gather(samples))
        lack = (gap + self._wanted).nan_to_num(0.0, 0.0, 0.0)
        self.factor.mul_(torch.exp(self.rate * lack))
        self.factor.clamp_(1 / _LARGEST, _LARGEST)
        return {"entropy_gap": gap, "temperature": self.factor.clone()}


def entropy_gap(data: Tensor, samples: Tensor) -> Tensor:
    """H(data) - H(samples) in nats a dimension, by distances to nearest neighbours (Kozachenko & Leonenko
    1987): of as many rows of both, everything else in that estimate is the same. A scalar.

    Neighbours are sought in groups of some 128 rows, whatever the batch. Structure finer than these are apart
    counts for nothing, which is wanted: a sampler that cannot be so fine would have its tau fall to 0.

    Args:
        data, samples: [N, *].
    """
    if data.shape != samples.shape or len(data) < 2:
        raise ValueError(
            f"data, samples: got {[*data.shape]} and {[*samples.shape]}, wants one shape, of two or more rows"
        )
    return _mean_log_distance(data) - _mean_log_distance(samples)


def _mean_log_distance(rows: Tensor) -> Tensor:
    """Of each row to its third nearest other in its group, or the farthest of fewer."""
    groups = rows.flatten(1).tensor_split(max(1, len(rows) // _GROUP))
    return torch.cat([_log_distances(group) for group in groups]).mean()


def _log_distances(rows: Tensor) -> Tensor:
    k = min(_NEIGHBOUR, len(rows) - 1)
    # Of products, distances between near rows would be rounding.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(k + 1, largest=False).values[:, k]  # the first is the row itself
    return nearest.clamp(min=torch.finfo(nearest.dtype).tiny).log()
