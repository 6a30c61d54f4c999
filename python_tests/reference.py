"""Float64 reference of `dxmi_ext.ops`, in plain numpy (noise) and differentiable torch (ops).

Written from the specification alone, without importing dxmi_ext, so that both do not share a fault.
Ops take float64 tensors under the names of the public functions; `z` stands in for `key` and `sample_offset`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MASK = 0xFFFFFFFF
RESERVED_TIMESTEP = MASK  # the step of x_0, and the default of `normal`


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon et al., 2011): counters [..., 4] of 32-bit words to words, uint64 [..., 4]."""
    c0, c1, c2, c3 = np.moveaxis(counter.astype(np.uint64), -1, 0)
    for i in range(10):
        k0, k1 = (np.uint64((key[j] + i * (0x9E3779B9, 0xBB67AE85)[j]) & MASK) for j in range(2))
        p0, p1 = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & MASK, (p0 >> 32) ^ c3 ^ k1, p0 & MASK
    return np.stack([c0, c1, c2, c3], axis=-1)


def uniforms(words: np.ndarray) -> np.ndarray:
    """float32 fma(float32(word), 2^-32, 2^-33): the float64 sum is exact, so it is rounded once."""
    exact = words.astype(np.uint32).astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33
    return exact.astype(np.float32)


def normal(
    shape: Sequence[int],
    key: tuple[int, int],
    timestep: int = RESERVED_TIMESTEP,
    sample_offset: int = 0,
) -> Tensor:
    """z of the noise format, float64 [N, *], for key = (seed, draw)."""
    seed, draw = key
    rows, size = shape[0], math.prod(shape[1:])
    counter = np.empty((rows, -(-size // 4), 4), np.uint64)
    counter[..., 0] = np.arange(counter.shape[1])
    counter[..., 1] = np.array([(sample_offset + n) & MASK for n in range(rows)], np.uint64)[:, None]
    counter[..., 2] = timestep & MASK
    counter[..., 3] = draw & MASK
    u = uniforms(philox4x32(counter, (seed & MASK, seed >> 32 & MASK))).astype(np.float64)
    radius, angle = np.sqrt(-2 * np.log(u[..., 0::2])), 2 * math.pi * u[..., 1::2]
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return torch.from_numpy(z.reshape(rows, 4 * counter.shape[1])[:, :size].reshape(shape))


def _column(row: Tensor, like: Tensor) -> Tensor:
    """[N] to [N, 1, ...], to broadcast over the data dimensions of `like`."""
    return row.reshape(-1, *[1] * (like.ndim - 1))


def _row_mean(x: Tensor) -> Tensor:
    """Mean over the data dimensions: [N, *] to [N]."""
    return x.reshape(len(x), math.prod(x.shape[1:])).mean(1)


def sampler_step(
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor,
    sample_coef: Tensor,
    output_coef: Tensor,
    log_std: Tensor,
    z: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """next_sample [N, *], log_prob [N], sq_displacement [N]."""
    a, b, std = (_column(c[timestep], sample) for c in (sample_coef, output_coef, log_std.exp()))
    next_sample = a * sample + b * model_output + std * z
    log_prob = -_row_mean(z**2) / 2 - log_std[timestep] - math.log(2 * math.pi) / 2
    return next_sample, log_prob, _row_mean((next_sample - sample) ** 2)


def transition_log_prob(
    next_sample: Tensor,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor,
    sample_coef: Tensor,
    output_coef: Tensor,
    log_std: Tensor,
) -> Tensor:
    """Mean over D of log N(next_sample; mean, std^2), [N]."""
    a, b, std = (_column(c[timestep], sample) for c in (sample_coef, output_coef, log_std.exp()))
    z = (next_sample - a * sample - b * model_output) / std
    return -_row_mean(z**2) / 2 - log_std[timestep] - math.log(2 * math.pi) / 2


def running_cost(
    sq_displacement: Tensor,
    timestep: Tensor,
    log_std: Tensor,
    velocity_var: Tensor,
    tau_entropy: float,
    tau_velocity: float,
    skip_last: int = 0,
) -> Tensor:
    """tau_velocity sq / (2 v) - tau_entropy log_std, zero in the last `skip_last` steps, [N]."""
    cost = tau_velocity * sq_displacement / (2 * velocity_var[timestep]) - tau_entropy * log_std[timestep]
    return torch.where(timestep < len(log_std) - skip_last, cost, 0.0)


def td_target(
    next_value: Tensor,
    sq_displacement: Tensor,
    timestep: Tensor,
    log_std: Tensor,
    velocity_var: Tensor,
    time_cost: Tensor,
    tau_entropy: float,
    tau_velocity: float,
    skip_last: int = 0,
) -> Tensor:
    """next_value + running_cost + time_cost[t], [N]."""
    step = (sq_displacement, timestep, log_std, velocity_var)
    cost = running_cost(*step, tau_entropy, tau_velocity, skip_last)
    return next_value + cost + time_cost[timestep]


def energy_loss(energy_data: Tensor, energy_sample: Tensor, gamma: float) -> Tensor:
    """mean Ed - mean Es + gamma (mean Ed^2 + mean Es^2), a scalar (DxMI, Alg. 1)."""
    squares = (energy_data**2).mean() + (energy_sample**2).mean()
    return energy_data.mean() - energy_sample.mean() + gamma * squares


def update_velocity_var_(velocity_var: Tensor, sq_displacement: Tensor, decay: float) -> Tensor:
    """decay v + (1 - decay) mean_B of sq_displacement [T, B], [T]; out of place here (DxMI, AVR)."""
    return decay * velocity_var + (1 - decay) * sq_displacement.mean(1)
