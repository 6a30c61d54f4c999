"""The tables of a schedule, from noise levels and the kind of prediction.

Imports torch and ``dxmi_ext.engine.arguments``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi_ext.engine.arguments import of_type

PREDICTIONS = ("eps", "v", "x", "edm")


class Schedule(NamedTuple):
    """A few-step Gaussian sampler without its network. Tables are float64 [T]."""

    sample_coef: Tensor
    """Coefficient of x_t in the mean of x_{t+1}."""
    output_coef: Tensor
    """Coefficient of the network's output in the mean of x_{t+1}."""
    log_std: Tensor
    """Log of the standard deviation of x_{t+1}."""
    signal: Tensor
    """At step t, x_t = signal[t] data + noise[t] eps; pretraining trains the network on it."""
    noise: Tensor
    """See ``signal``."""
    initial_std: float
    """x_0 ~ N(0, initial_std^2 I)."""
    time: Tensor
    """The network's time at step t: a DDPM timestep, fractional in general, or EDM's c_noise."""
    input_scale: Tensor
    """Factor of the network's input, such as EDM's c_in; `sampler.Timed` applies both."""


_TABLES = [name for name in Schedule._fields if name != "initial_std"]


def from_levels(
    signal: Tensor,
    noise: Tensor,
    std: Tensor,
    *,
    time: Tensor,
    initial_std: float,
    min_std: float,
    prediction: str = "eps",
    sigma_data: float = 0.5,
) -> Schedule:
    """Steps from one noise level to the next (Song et al. 2021, DDIM, eq. 12, for any levels).

    ``x_{t+1} = signal[t+1] data + sqrt(noise[t+1]^2 - std[t]^2) eps + std[t] z``, where data and eps are
    linear functions of x_t and the network's output. `sampler.Clipped` also clips the data.

    Args:
        signal, noise: levels of x_0 .. x_T, [T + 1]; the last is usually 1, 0: the data.
        std: standard deviations [T], at most the noise of the next level; `posterior_std`, or less.
        time: the network's times [T].
        initial_std: standard deviation of x_0.
        min_std: lower bound of the standard deviation of the noise, which keeps log sigma finite. The mean is
            computed with ``std`` itself.
        prediction: what the network predicts: "eps"; "x", the data; "v" = (signal eps - noise data) /
            sqrt(signal^2 + noise^2) (Salimans & Ho 2022); "edm", F of Karras et al. 2022, eq. 7.
        sigma_data: standard deviation of the data, for "edm".

    Raises:
        TypeError, ValueError: names the argument and its requirement.
    """
    given = {"signal": signal, "noise": noise, "std": std, "time": time}
    for name, tensor in given.items():
        of_type(name, tensor, Tensor, "a tensor")
    steps = len(std)
    wanted = {"signal": steps + 1, "noise": steps + 1, "std": steps, "time": steps}
    for name, tensor in given.items():
        if tensor.shape != (wanted[name],) or not tensor.isfinite().all():
            raise ValueError(f"{name} must be {wanted[name]} finite values for {steps} steps, got {tensor}")
    signal, noise, std = signal.double(), noise.double(), std.double()
    _check_numbers(initial_std=initial_std, min_std=min_std, sigma_data=sigma_data)
    if prediction not in PREDICTIONS:
        raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {prediction!r}")
    if (signal < 0).any() or (prediction in ("eps", "edm") and (signal[:-1] == 0).any()):
        raise ValueError(f"signal must be > 0, or >= 0 with prediction v or x, got {signal}")
    if not ((noise[:-1] > 0).all() and noise[-1] >= 0):
        raise ValueError(f"noise must be > 0, and >= 0 at the last level, got {noise}")
    if not ((std >= 0) & (std <= noise[1:] * (1 + 1e-12))).all():
        raise ValueError(f"std must be >= 0 and <= the noise of the next level, {noise[1:]}, got {std}")

    s, n, next_signal = signal[:-1], noise[:-1], signal[1:]
    skip, out, input_scale = reading(prediction, s, n, sigma_data)
    eps_coef = (noise[1:] ** 2 - std**2).clamp(min=0).sqrt()
    data_coef = next_signal - eps_coef * s / n  # with eps = (x_t - s data) / n
    return Schedule(
        sample_coef=eps_coef / n + data_coef * skip,
        output_coef=data_coef * out,
        log_std=std.clamp(min=min_std).log(),
        signal=s,
        noise=n,
        initial_std=initial_std,
        time=time.double(),
        input_scale=input_scale,
    )


def reading(
    prediction: str, signal: Tensor, noise: Tensor, sigma_data: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients skip, out and input_scale, shaped like signal and noise, of the predicted data
    ``skip x_t + out network(input_scale x_t)``.

    Args:
        prediction: as in `from_levels`.
        sigma_data: as in `from_levels`.
        signal, noise: levels in x_t = signal data + noise eps.
    """
    total = (signal**2 + noise**2).sqrt()
    ones = torch.ones_like(signal)
    if prediction == "eps":
        return 1 / signal, -noise / signal, ones
    if prediction == "x":
        return torch.zeros_like(signal), ones, ones
    if prediction == "v":
        return signal / total**2, -noise / total, 1 / total
    sigma = noise / signal  # the noise level of x_t / signal
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    return (sigma_data * c_in) ** 2 / signal, sigma * sigma_data * c_in, c_in / signal


def joined(chains: Sequence[Schedule]) -> Schedule:
    """The concatenated tables of chains of several lengths, for one `GaussianSampler`.

    Raises:
        ValueError: they start from different noise.
    """
    starts = [chain.initial_std for chain in chains]
    if len(set(starts)) != 1:
        raise ValueError(f"chains must have the same initial_std, got {starts}")
    tables = {name: torch.cat([getattr(chain, name) for chain in chains]) for name in _TABLES}
    return Schedule(**tables, initial_std=starts[0])


def target(
    prediction: str, data: Tensor, eps: Tensor, signal: Tensor, noise: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """Training target at signal data + noise eps of a network with this prediction (see `from_levels`).

    Args:
        data, eps: [N, *].
        signal, noise: levels, broadcast against data.
    """
    if prediction == "eps":
        return eps
    if prediction == "x":
        return data
    if prediction == "v":
        return (signal * eps - noise * data) / (signal**2 + noise**2).sqrt()
    sigma = noise / signal
    return (sigma * data - sigma_data**2 * eps) / (sigma_data * (sigma**2 + sigma_data**2).sqrt())


def posterior_std(signal: Tensor, noise: Tensor) -> Tensor:
    """Standard deviation of x_{t+1} given x_t and the data (Ho et al. 2020, eq. 7, for any levels), [T].

    Args:
        signal, noise: levels of x_0 .. x_T, [T + 1].
    """
    kept = noise[1:] * signal[:-1] / signal[1:]  # share of x_{t+1}'s noise in x_t
    return noise[1:] / noise[:-1] * (noise[:-1] ** 2 - kept**2).clamp(min=0).sqrt()


def check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must be >= 0 and <= 1, got {value}")


def _check_numbers(**values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise ValueError(f"{name} must be > 0, got {value}")
