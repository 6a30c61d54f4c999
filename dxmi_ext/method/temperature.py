"""An automatic temperature that follows the entropy of the data.

At DxMI's equilibrium, samples and data have the same distribution and entropy for any tau; training comes
close to it for a range of tau. Below that range the sampler collapses to low energies, above it the samples
spread beyond the data; within it, a larger tau gives a more accurate energy. So tau is the multiplier, found
by dual ascent, of the constraint that the samples' entropy exceeds the data's by a margin. Once the energy
has learned, the margin decays, so that samples end close to the data.
Imports torch, the engine and ``dxmi_ext.method.sampler``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method.sampler import flat

_NEIGHBOR = 3
_GROUP = 128
_LARGEST = 1000.0  # the factor stays within this and its inverse
_RESOLUTION = 1e-3  # of distances, in units of the data's spread: a few copies would outweigh all other rows
_REPEATED = 0.05  # largest share of rows with copies


class Temperature:
    """A common factor of all taus.

    Args:
        rate: growth exp(rate) per iteration for each nat per dimension that the samples lack.
        factor: initial factor, a scalar on the device; updated in place.
        ranks: ranks whose rows are combined, so that the factor is the same on all.
        margin: nats per dimension by which the samples' entropy should exceed the data's at first.
        hold: share of the run after which the margin decays linearly to 0.

    Attributes:
        factor: current factor, on the device.
    """

    def __init__(
        self,
        rate: float,
        factor: Tensor,
        ranks: Ranks | None = None,
        *,
        margin: float = 0.0,
        hold: float = 0.5,
    ) -> None:
        self.rate, self.factor, self.ranks = rate, factor, ranks or Ranks()
        self._margin, self._hold, self._wanted = margin, hold, factor.new_tensor(margin)

    def check(self, data: Tensor) -> None:
        """Checks that data have an entropy to follow.

        Raises:
            ConfigError: many of the rows [N, *] have copies, as the points of a small data set or of a grid.
        """
        repeated = int((_nearest(data) == 0).sum())
        if repeated > _REPEATED * len(data):
            raise ConfigError(
                "tau_rate must be 0 for data with repeated points, whose entropy is not finite, got "
                f"{self.rate:g} and a batch with copies of {repeated} of its {len(data)} rows"
            )

    def at(self, done: float) -> None:
        """Sets the margin for the progress of the run, 0 at its start and 1 at its end."""
        self._wanted.fill_(self._margin * min(1.0, (1 - done) / (1 - self._hold)))

    @torch.no_grad()
    def update(self, data: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """One step of dual ascent, in place. It is skipped if rows are not finite.

        Args:
            data, samples: this rank's rows, both [N, *].

        Returns:
            The metrics to log.

        Raises:
            ConfigError: all ranks together have one row, which has no neighbor.
        """
        data, samples = self.ranks.gather(data), self.ranks.gather(samples)
        if len(data) < 2:
            raise ConfigError(f"a batch must have at least 2 rows with tau_rate, got {len(data)}")
        gap = entropy_gap(data, samples)
        lack = (gap + self._wanted).nan_to_num(0.0, 0.0, 0.0)
        self.factor.mul_(torch.exp(self.rate * lack)).clamp_(1 / _LARGEST, _LARGEST)
        return {"entropy_gap": gap, "temperature": self.factor.clone()}


def entropy_gap(data: Tensor, samples: Tensor) -> Tensor:
    """H(data) - H(samples) in nats per dimension, a scalar, from nearest-neighbor distances (Kozachenko &
    Leonenko 1987); with the same number of rows, the other terms of the estimate cancel.

    Neighbors are searched in groups of about 128 rows, whatever the batch size. This ignores finer structure
    on purpose: tau would fall to 0 for a sampler that cannot resolve it.

    Args:
        data, samples: [N, *].
    """
    if data.shape != samples.shape or len(data) < 2:
        raise ValueError(
            f"data, samples must have one shape [n >= 2, *], got {[*data.shape]}, {[*samples.shape]}"
        )
    spread = flat(data).std(dim=0, correction=0).norm()
    resolution = (_RESOLUTION * spread).clamp(min=torch.finfo(spread.dtype).tiny)
    return (_nearest(data).maximum(resolution).log() - _nearest(samples).maximum(resolution).log()).mean()


def _nearest(rows: Tensor) -> Tensor:
    """Distance of each row to the third nearest other row of its group, or to the farthest in a small group,
    [N]."""
    groups = flat(rows).tensor_split(max(1, len(rows) // _GROUP))
    return torch.cat([_nearest_in(group) for group in groups])


def _nearest_in(rows: Tensor) -> Tensor:
    k = min(_NEIGHBOR, len(rows) - 1)
    # Computed by matrix products, distances between near rows would be rounding errors.
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return distances.topk(k + 1, largest=False).values[:, k]  # the first is the row itself
