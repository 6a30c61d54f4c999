"""Variance-preserving schedules: x_t = sqrt(alpha_bar) data + sqrt(1 - alpha_bar) eps.

Imports torch and ``dxmi_ext.engine.arguments``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from dxmi_ext.engine.arguments import at_least, of_type
from dxmi_ext.method.schedules.tables import Schedule, check_fraction, from_levels, posterior_std


def make_betas(kind: str = "linear", *, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> Tensor:
    """Betas of the forward process, float64 [steps], first step first.

    Args:
        kind: "linear" (Ho et al. 2020); "scaled_linear", linear in sqrt(beta) (latent diffusion); "cosine"
            (Nichol & Dhariwal 2021), which ignores start and end.
        steps: number of betas.
        start: first beta.
        end: last beta.
    """
    at_least("steps", steps, 1)
    if not 0 < start <= end < 1:
        raise ValueError(f"start, end must satisfy 0 < start <= end < 1, got {start}, {end}")
    if kind == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if kind == "cosine":
        when = torch.arange(steps + 1, dtype=torch.float64) / steps
        alpha_bar = torch.cos((when + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"kind must be linear, scaled_linear or cosine, got {kind!r}")


def ddpm(betas: Tensor, *, min_std: float = 0.05) -> Schedule:
    """Ancestral sampling with an eps-prediction network, one step per beta (Ho et al. 2020).

    Args:
        betas: [T], in the order of the forward process.
        min_std: lower bound of the posterior's standard deviation, which is 0 at the last step.
    """
    _check_betas(betas)
    return ddim(range(len(betas) - 1, -1, -1), betas=betas, eta=1.0, min_std=min_std)


def ddim(
    steps: int | Sequence[int],
    *,
    eta: float = 0.0,
    betas: Tensor | None = None,
    spacing: str = "leading",
    offset: int = 0,
    large_std: bool = False,
    prediction: str = "eps",
    min_std: float = 1e-3,
) -> Schedule:
    """DDIM on a subset of the timesteps of a DDPM (Song et al. 2021).

    Each step goes to the next timestep, the last one to the data. diffusers instead goes down by
    len(betas) // T, which differs for "linspace" and if T is not a divisor.

    Args:
        steps: T, for timesteps spaced as `spacing` says, or the timesteps themselves, descending.
        eta: factor of the posterior's standard deviation; 0 is DDIM, 1 is DDPM.
        betas: betas of the DDPM; None: `make_betas()`.
        spacing: "leading", "trailing" or "linspace", as in diffusers (Lin et al. 2023, Table 2).
        offset: added to "leading" timesteps.
        large_std: use the standard deviation of the forward process instead of eta times the posterior's,
            except in the last step (DDPM's fixed large variance, DDIM's sigma hat).
        prediction: what the network predicts; see `from_levels`.
        min_std: lower bound of a step's standard deviation, which the last step always has, and every step
            with eta = 0; the paper's image runs freeze the last one (``train_last_std=false``).
    """
    check_fraction("eta", eta)
    betas = make_betas() if betas is None else betas
    _check_betas(betas)
    if not isinstance(steps, Iterable):
        timesteps = _spaced(steps, len(betas), spacing, offset)
    else:
        given = torch.tensor([*steps])
        timesteps = given.long()
        if (timesteps != given).any():
            raise ValueError(f"steps must be integers, got {given.tolist()}")
    inside = len(timesteps) > 0 and timesteps[-1] >= 0 and timesteps[0] < len(betas)
    if not inside or (timesteps.diff() >= 0).any():
        raise ValueError(f"steps must descend within {len(betas) - 1}..0, got {timesteps.tolist()}")
    alpha_bar = (1 - betas.double()).cumprod(0)[timesteps]
    schedule = _from_alpha_bar(alpha_bar, timesteps, eta, prediction=prediction, min_std=min_std)
    if large_std:
        std = (1 - alpha_bar[:-1] / alpha_bar[1:]).sqrt().clamp(min=min_std)
        schedule = schedule._replace(log_std=torch.cat((std.log(), schedule.log_std[-1:])))
    return schedule


def fastdpm(
    steps: int,
    *,
    growth: str = "quadratic",
    kappa: float = 1.0,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    train_steps: int = 1000,
    prediction: str = "eps",
    min_std: float = 1e-3,
) -> Schedule:
    """FastDPM's VAR (Kong & Ping 2021, sec. 3): T new betas for a DDPM with linear betas.

    They grow from beta_start as far as the DDPM's total noise and their own bound allow. The network's time
    is the fractional timestep at which the DDPM has the same noise level. The paper's CIFAR-10 sampler is
    ``fastdpm(10)``.

    Args:
        steps: T, at least 2.
        growth: "quadratic": (sqrt(beta_start) + c i / T)^2, c <= .95; "linear": at most .99.
        kappa: factor of the posterior's standard deviation.
        beta_start: first of the DDPM's linear betas.
        beta_end: last of them.
        train_steps: number of them.
        prediction: what the network predicts; see `from_levels`.
        min_std: lower bound of a step's standard deviation, as in `ddim`.
    """
    at_least("steps", steps, 2)
    check_fraction("kappa", kappa)
    if steps > train_steps:
        raise ValueError(f"steps must be <= train_steps={train_steps}, got {steps}")
    if not beta_start < beta_end:
        raise ValueError(f"beta_start must be < beta_end={beta_end}, got {beta_start}")
    total = _product(make_betas(steps=train_steps, start=beta_start, end=beta_end))
    index = torch.arange(steps, dtype=torch.float64)
    grow: Callable[[float], Tensor]
    if growth == "quadratic":
        bound = 0.95

        def grow(c: float) -> Tensor:
            return (beta_start**0.5 + c * index / steps) ** 2

    elif growth == "linear":
        bound = 0.99

        def grow(c: float) -> Tensor:
            return torch.linspace(beta_start, c, steps, dtype=torch.float64)

    else:
        raise ValueError(f"growth must be quadratic or linear, got {growth!r}")
    betas = grow(_largest(lambda c: _product(grow(c)) >= total, 0.0, bound))
    alpha_bar = (1 - betas).cumprod(0)

    # prod_{i <= t} (1 - beta_start - i slope), continued to real t
    slope = (beta_end - beta_start) / (train_steps - 1)
    top = (1 - beta_start) / slope

    def log_alpha_bar(t: float) -> float:
        return (t + 1) * math.log(slope) + math.lgamma(top + 1) - math.lgamma(top - t)

    def timestep(level: float) -> float:
        root = _largest(lambda t: log_alpha_bar(t) >= math.log(level), 0.0, train_steps - 1.0)
        return round(root, 5)  # lgamma's values are large: about 1e-6 of the difference is lost

    alpha_bar = alpha_bar.flip(0)
    time = torch.tensor([timestep(level) for level in alpha_bar.tolist()], dtype=torch.float64)
    return _from_alpha_bar(alpha_bar, time, kappa, prediction=prediction, min_std=min_std)


def _from_alpha_bar(
    alpha_bar: Tensor, time: Tensor, eta: float, *, prediction: str, min_std: float
) -> Schedule:
    """Steps along ascending levels alpha_bar [T], the last one to the data."""
    alpha_bar = torch.cat((alpha_bar, alpha_bar.new_ones(1)))
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    std = eta * posterior_std(signal, noise)
    return from_levels(signal, noise, std, time=time, initial_std=1.0, min_std=min_std, prediction=prediction)


def _spaced(steps: int, total: int, spacing: str, offset: int) -> Tensor:
    """Timesteps of a DDPM, int64 [steps], descending."""
    at_least("steps", steps, 1)
    if steps > total:
        raise ValueError(f"steps must be <= {total}, the number of betas, got {steps}")
    index = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        return (index.long() * (total // steps) + offset).flip(0)
    if spacing == "trailing":
        return (total - index * (total / steps)).round().long() - 1
    if spacing == "linspace":
        return torch.linspace(0, total - 1, steps, dtype=torch.float64).round().long().flip(0)
    raise ValueError(f"spacing must be leading, trailing or linspace, got {spacing!r}")


def _check_betas(betas: Tensor) -> None:
    of_type("betas", betas, Tensor, "a tensor")
    if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
        raise ValueError(f"betas must be a vector within (0, 1), got {betas}")


def _product(betas: Tensor) -> float:
    return (1 - betas).prod().item()


def _largest(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The largest x in [low, high] for which a monotone condition holds, to the last bit; else low."""
    if holds(high):
        return high
    while low < (middle := (low + high) / 2) < high:
        if holds(middle):
            low = middle
        else:
            high = middle
    return low
