"""Schedules against the papers' formulas in plain floats, known values of DxMI's setting, and diffusers."""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dxmi_ext.method import schedules
from dxmi_ext.method.schedules import Schedule

Chain = list[float]
"""x_0 .. x_T of one number."""


def walk(schedule: Schedule, outputs: Sequence[float], noise: Sequence[float]) -> Chain:
    """The tables as the sampler uses them."""
    path = [1.7 * schedule.initial_std]
    for t, (output, z) in enumerate(zip(outputs, noise, strict=True)):
        a, b, log_std = (table[t].item() for table in schedule[:3])
        path.append(a * path[-1] + b * output + math.exp(log_std) * z)
    return path


def assert_walks(schedule: Schedule, reference: Callable[[float, Any, Any], Chain]) -> None:
    """A chain with arbitrary outputs and noise; the reference gets x_0, outputs and noise."""
    draw = random.Random(0)
    outputs, noise = ([draw.gauss(0, 1) for _ in schedule.log_std] for _ in range(2))
    assert walk(schedule, outputs, noise) == pytest.approx(
        reference(1.7 * schedule.initial_std, outputs, noise), rel=1e-9, abs=1e-9
    )


# --- the papers' formulas ----------------------------------------------------------------------------


def alpha_bars(betas: Sequence[float]) -> list[float]:
    return list(itertools.accumulate((1 - b for b in betas), operator.mul))


LINEAR = [1e-4 + (0.02 - 1e-4) * i / 999 for i in range(1000)]


def data_and_eps(prediction: str, x: float, output: float, alpha_bar: float) -> tuple[float, float]:
    signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    if prediction == "eps":
        return (x - noise * output) / signal, output
    if prediction == "v":  # Salimans & Ho 2022, appendix D
        return signal * x - noise * output, noise * x + signal * output
    return output, (x - signal * output) / noise


def ddim_chain(levels: Sequence[float], eta: float, prediction: str, min_std: float) -> Callable[..., Chain]:
    """Song et al. 2021, eq. 12 and 16, along alpha_bar `levels`."""

    def chain(x: float, outputs: Sequence[float], noise: Sequence[float]) -> Chain:
        path = [x]
        for now, following, output, z in zip(levels, [*levels[1:], 1.0], outputs, noise, strict=True):
            data, eps = data_and_eps(prediction, path[-1], output, now)
            std = eta * math.sqrt((1 - following) / (1 - now)) * math.sqrt(1 - now / following)
            mean = math.sqrt(following) * data + math.sqrt(1 - following - std**2) * eps
            path.append(mean + max(std, min_std) * z)
        return path

    return chain


def posterior_chain(betas: Sequence[float], prediction: str, min_std: float) -> Callable[..., Chain]:
    """Ho et al. 2020, eq. 6 and 7, through all betas."""

    def chain(x: float, outputs: Sequence[float], noise: Sequence[float]) -> Chain:
        path, products = [x], [1.0, *alpha_bars(betas)]
        for step, output, z in zip(reversed(range(len(betas))), outputs, noise, strict=True):
            beta, now, previous = betas[step], products[step + 1], products[step]
            data, _ = data_and_eps(prediction, path[-1], output, now)
            mean = math.sqrt(previous) * beta / (1 - now) * data
            mean += math.sqrt(1 - beta) * (1 - previous) / (1 - now) * path[-1]
            std = math.sqrt(beta * (1 - previous) / (1 - now))
            path.append(mean + max(std, min_std) * z)
        return path

    return chain


def edm_chain(sigmas: Sequence[float], sigma_data: float, eta: float, min_std: float) -> Callable[..., Chain]:
    """Karras et al. 2022, table 1, with the ancestral step of Song et al. 2021, appendix F."""

    def chain(x: float, outputs: Sequence[float], noise: Sequence[float]) -> Chain:
        path = [x]
        for now, following, output, z in zip(sigmas[:-1], sigmas[1:], outputs, noise, strict=True):
            total = now**2 + sigma_data**2
            denoised = sigma_data**2 / total * path[-1] + now * sigma_data / math.sqrt(total) * output
            up = eta * math.sqrt(following**2 * (now**2 - following**2) / now**2)
            down = math.sqrt(following**2 - up**2)
            mean = path[-1] + (path[-1] - denoised) / now * (down - now)
            path.append(mean + max(up, min_std) * z)
        return path

    return chain


def karras(count: int, rho: float) -> list[float]:
    high, low = 80 ** (1 / rho), 0.002 ** (1 / rho)
    return [(high + i / (count - 1) * (low - high)) ** rho for i in range(count)]


def test_ddpm_is_the_textbooks() -> None:
    betas = [0.1, 0.25, 0.4, 0.55, 0.7]
    schedule = schedules.ddpm(torch.tensor(betas, dtype=torch.float64))
    assert_walks(schedule, posterior_chain(betas, "eps", 0.05))
    levels = alpha_bars(betas)[::-1]
    assert schedule.signal.tolist() == pytest.approx([math.sqrt(level) for level in levels])
    assert schedule.noise.tolist() == pytest.approx([math.sqrt(1 - level) for level in levels])
    assert schedule.initial_std == 1 and schedule.time.tolist() == [4, 3, 2, 1, 0]


def test_ddpm_of_1000_steps_is_the_textbooks() -> None:
    schedule = schedules.ddim(1000, eta=1.0)
    assert_walks(schedule, posterior_chain(LINEAR, "eps", 1e-3))


def test_variance_exploding_is_the_textbooks() -> None:
    """Song et al. 2021, appendix F: ancestral sampling from level s to r, with score = -eps / s."""
    schedule = schedules.variance_exploding(5, sigma_max=3.0, sigma_min=0.4)
    for step in range(5):
        s = 3 * (0.4 / 3) ** (step / 4)
        r = 3 * (0.4 / 3) ** ((step + 1) / 4) if step < 4 else 0.0
        std = max(math.sqrt(r**2 * (s**2 - r**2) / s**2), 0.05)
        row = [table[step].item() for table in schedule[:5]]
        assert row == pytest.approx((1.0, -(s**2 - r**2) / s, math.log(std), 1.0, s), rel=1e-12)
    assert schedule.initial_std == 3


@pytest.mark.parametrize("prediction", ["eps", "v", "x"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("spacing", "timesteps"),
    [
        ("leading", [750, 500, 250, 0]),
        ("trailing", [999, 749, 499, 249]),
        ("linspace", [999, 666, 333, 0]),
    ],
)
def test_ddim_is_the_papers(spacing: str, timesteps: list[int], eta: float, prediction: str) -> None:
    schedule = schedules.ddim(4, eta=eta, spacing=spacing, prediction=prediction)
    assert schedule.time.tolist() == timesteps
    levels = [alpha_bars(LINEAR)[t] for t in timesteps]
    assert_walks(schedule, ddim_chain(levels, eta, prediction, 1e-3))
    chosen = schedules.ddim(timesteps, eta=eta, prediction=prediction)
    assert all(map(torch.equal, chosen[:5], schedule[:5]))


@pytest.mark.parametrize("stochastic_last", [False, True])
@pytest.mark.parametrize(("steps", "rho", "eta"), [(10, 7.0, 1.0), (4, 4.0, 1.0), (10, 7.0, 0.0)])
def test_edm_is_the_papers(steps: int, rho: float, eta: float, stochastic_last: bool) -> None:
    schedule = schedules.edm(steps, rho=rho, eta=eta, stochastic_last=stochastic_last)
    sigmas = karras(steps + 1, rho) if stochastic_last else [*karras(steps, rho), 0.0]
    assert_walks(schedule, edm_chain(sigmas, 0.5, eta, 1e-3))
    assert schedule.initial_std == 80
    c_in = [1 / math.sqrt(s**2 + 0.25) for s in sigmas[:-1]]
    assert schedule.input_scale.tolist() == pytest.approx(c_in)
    assert schedule.time.tolist() == pytest.approx([math.log(s) / 4 for s in sigmas[:-1]])
    posterior = stochastic_last and eta == 1  # else min_std
    assert schedule.log_std[-1].exp().item() == pytest.approx(0.002 if posterior else 1e-3, rel=0.01)


# --- FastDPM: DxMI's settings of CIFAR-10 ------------------------------------------------------------

VAR = {
    10: (
        [1e-4, 0.011025, 0.04, 0.087025, 0.1521, 0.235225, 0.3364, 0.455625, 0.5929, 0.748225],
        [616.73, 493.98, 394.08, 308.87, 234.86, 170.30, 114.36, 66.87, 28.29, 0],
    ),
    4: ([1e-4, 0.061256, 0.235225, 0.522006], [321.87, 176.86, 74.32, 0]),
}


@pytest.mark.parametrize("kappa", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("steps", VAR)
def test_fastdpm_has_the_papers_values(steps: int, kappa: float) -> None:
    betas, timesteps = VAR[steps]
    schedule = schedules.fastdpm(steps, kappa=kappa)
    assert schedule.time.tolist() == pytest.approx(timesteps, abs=0.006)
    assert schedule.time[-1] == 0
    products = alpha_bars([(0.01 + 0.95 * i / steps) ** 2 for i in range(steps)])
    assert [1 - b / a for a, b in zip([1.0, *products], products, strict=False)] == pytest.approx(
        betas, abs=6e-7
    )
    assert_walks(schedule, ddim_chain(products[::-1], kappa, "eps", 1e-3))
    assert schedule.log_std[-1].exp().item() == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("growth", "steps"), [("quadratic", 10), ("quadratic", 100), ("linear", 4), ("linear", 10)]
)
def test_fastdpm_keeps_to_the_ddpms_levels(growth: str, steps: int) -> None:
    """A fractional timestep lies between integer ones whose levels enclose its own; the first is the DDPM's
    last one, unless the bound of the betas is reached before."""
    schedule = schedules.fastdpm(steps, growth=growth)
    products = alpha_bars(LINEAR)
    alpha_bar = (schedule.signal**2).tolist()
    for level, time in zip(alpha_bar, schedule.time.tolist(), strict=True):
        assert products[math.ceil(time)] - 1e-9 <= level <= products[math.floor(time)] + 1e-9
    betas = [1 - b / a for a, b in zip([1.0, *alpha_bar[::-1]], alpha_bar[::-1], strict=False)]
    grown = [b**0.5 for b in betas] if growth == "quadratic" else betas
    assert grown == pytest.approx([grown[0] + i * (grown[1] - grown[0]) for i in range(steps)])
    if (growth, steps) in [("quadratic", 100), ("linear", 10)]:
        assert alpha_bar[0] == pytest.approx(products[-1])
        assert schedule.time[0].item() == pytest.approx(999)
    else:
        last = (0.01 + 0.95 * (steps - 1) / steps) ** 2 if growth == "quadratic" else 0.99
        assert betas[-1] == pytest.approx(last)


# --- any levels, any prediction ----------------------------------------------------------------------


def true_output(prediction: str, data: Tensor, eps: Tensor, signal: float, noise: float) -> Tensor:
    """The output of a network that knows data and eps."""
    if prediction == "eps":
        return eps
    if prediction == "x":
        return data
    if prediction == "v":
        return (signal * eps - noise * data) / math.hypot(signal, noise)
    sigma, x = noise / signal, data + noise / signal * eps  # Karras et al. 2022, eq. 8, for sigma_data = .5
    return (data - 0.25 / (sigma**2 + 0.25) * x) * math.sqrt(sigma**2 + 0.25) / (0.5 * sigma)


@pytest.mark.parametrize("prediction", ["eps", "v", "x", "edm"])
def test_every_step_goes_from_level_to_level(prediction: str) -> None:
    """With true outputs, the mean has the next level's signal, and its noise without the std's share."""
    signal = torch.tensor([0.1, 0.4, 0.7, 0.9, 1.0], dtype=torch.float64)
    noise = torch.tensor([2.0, 1.1, 0.8, 0.3, 0.0], dtype=torch.float64)
    std = 0.7 * schedules.posterior_std(signal, noise)
    schedule = schedules.from_levels(
        signal, noise, std, time=torch.arange(4), initial_std=2.0, min_std=0.01, prediction=prediction
    )
    data, eps = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for t in range(4):
        x = signal[t] * data + noise[t] * eps
        output = true_output(prediction, data, eps, signal[t].item(), noise[t].item())
        mean = schedule.sample_coef[t] * x + schedule.output_coef[t] * output
        expected = signal[t + 1] * data + (noise[t + 1] ** 2 - std[t] ** 2).sqrt() * eps
        torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(schedule.log_std.exp(), std.clamp(min=0.01))
    if prediction in ("v", "edm"):  # input of variance 1 for data of variance 1, sigma_data^2
        data_var = 1.0 if prediction == "v" else 0.25
        input_var = schedule.input_scale**2 * (signal**2 * data_var + noise**2)[:-1]
        torch.testing.assert_close(input_var, torch.ones_like(input_var))
    else:
        assert (schedule.input_scale == 1).all()


def test_a_first_level_without_signal() -> None:
    """Zero terminal SNR works with v and x; eps would divide by 0."""
    levels = torch.tensor([0.0, 0.8, 1.0]), torch.tensor([1.0, 0.6, 0.0]), torch.zeros(2)
    rest: dict[str, Any] = {"time": torch.arange(2), "initial_std": 1.0, "min_std": 1e-3}
    for prediction in ("v", "x"):
        made = schedules.from_levels(*levels, **rest, prediction=prediction)
        assert made.sample_coef.isfinite().all() and made.output_coef.isfinite().all()
    with pytest.raises(ValueError, match=r"signal must be > 0, or >= 0 with prediction v or x, got"):
        schedules.from_levels(*levels, **rest)


@pytest.mark.parametrize("name", schedules.CHOICES)
def test_tables_are_finite_float64_and_end_without_noise(name: str) -> None:
    options = {"sigma_max": 3.0, "sigma_min": 0.4} if name == "variance_exploding" else {}
    schedule = schedules.CHOICES[name](5, **options)
    for table in (*schedule[:5], *schedule[6:]):
        assert table.shape == (5,) and table.dtype == torch.float64 and table.isfinite().all()
    least = 0.05 if name == "variance_exploding" else 1e-3
    assert schedule.log_std[-1].item() == pytest.approx(math.log(least))
    assert schedule.time.diff().lt(0).all()


def test_steps_may_be_an_integer_of_numpy() -> None:
    assert torch.equal(schedules.ddim(np.int64(5)).time, schedules.ddim(5).time)


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "steps": (lambda: schedules.edm(1), "steps must be >= 2, got 1"),
    "fractional number of steps": (lambda: schedules.fastdpm(2.5), "steps must be an integer >= 2, got 2.5"),
    "sigmas": (
        lambda: schedules.variance_exploding(5, sigma_max=0.4, sigma_min=0.4),
        "sigma_min, sigma_max must satisfy 0 < sigma_min < sigma_max, got 0.4, 0.4",
    ),
    "nan": (lambda: schedules.edm(5, sigma_min=math.nan), "must satisfy 0 < sigma_min < sigma_max, got nan"),
    "rho": (lambda: schedules.edm(5, rho=0.0), "rho must be > 0, got 0.0"),
    "eta": (lambda: schedules.ddim(5, eta=1.5), "eta must be >= 0 and <= 1, got 1.5"),
    "kappa": (lambda: schedules.fastdpm(5, kappa=-1.0), "kappa must be >= 0 and <= 1, got -1.0"),
    "growth": (
        lambda: schedules.fastdpm(5, growth="cubic"),
        "growth must be quadratic or linear, got 'cubic'",
    ),
    "spacing": (
        lambda: schedules.ddim(5, spacing="even"),
        "spacing must be leading, trailing or linspace, got 'even'",
    ),
    "timesteps": (lambda: schedules.ddim([1, 2]), "steps must descend within 999..0, got [1, 2]"),
    "far timestep": (lambda: schedules.ddim([1000, 2]), "steps must descend within 999..0, got [1000, 2]"),
    "too many": (lambda: schedules.ddim(1001), "steps must be <= 1000, the number of betas, got 1001"),
    "fractional": (lambda: schedules.ddim([999, 0.5]), "steps must be integers, got [999.0, 0.5]"),
    "betas": (lambda: schedules.ddpm(torch.tensor([0.5, 1.0])), "betas must be a vector within (0, 1), got"),
    "list of betas": (lambda: schedules.ddpm([0.5]), "betas must be a tensor, got list"),
    "list of levels": (
        lambda: schedules.from_levels(
            torch.ones(2), [1.0, 0.0], torch.zeros(1), time=torch.ones(1), initial_std=1.0, min_std=1.0
        ),
        "noise must be a tensor, got list",
    ),
    "list of places": (
        lambda: schedules.variance_exploding(2, sigma_max=2.0, sigma_min=1.0, places=[0.0, 1.0]),
        "places must be a tensor or None, got list",
    ),
    "kind": (
        lambda: schedules.make_betas("sqrt"),
        "kind must be linear, scaled_linear or cosine, got 'sqrt'",
    ),
    "prediction": (
        lambda: schedules.ddim(5, prediction="score"),
        "prediction must be one of ",
    ),
    "min_std": (lambda: schedules.ddim(5, min_std=0.0), "min_std must be > 0, got 0.0"),
    "std": (
        lambda: schedules.from_levels(
            *torch.tensor([[0.5, 1.0], [1.0, 0.0]]),
            torch.ones(1),
            time=torch.ones(1),
            initial_std=1.0,
            min_std=1.0,
        ),
        "std must be >= 0 and <= the noise of the next level",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, says = BAD[name]
    with pytest.raises((TypeError, ValueError)) as error:
        make()
    assert says in str(error.value)


# --- diffusers ---------------------------------------------------------------------------------------

OUTPUTS = torch.randn(10, 8, 8, generator=torch.Generator().manual_seed(1))
START = torch.randn(8, 8, generator=torch.Generator().manual_seed(2))
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x": "sample"}
BETA_KINDS = {"linear": "linear", "scaled_linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}


def peer(name: str, **config: Any) -> Any:
    diffusers = pytest.importorskip("diffusers", reason="compares with the schedulers of diffusers")
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(len(OUTPUTS))
    return scheduler


def assert_steps(schedule: Schedule, scheduler: Any, *, scale: Tensor | None = None, **options: Any) -> None:
    """Asserts that both have the same path, with equal outputs and noise.

    Args:
        schedule: our schedule.
        scheduler: a scheduler of diffusers, which draws noise as randn_like does.
        scale: ratio of diffusers' x_t to ours, [T + 1]; None: ones.
        options: arguments of the scheduler's `step`.
    """
    steps = len(OUTPUTS)
    scale = torch.ones(steps + 1, dtype=torch.float64) if scale is None else scale
    ours, theirs = START.double() * schedule.initial_std, START * schedule.initial_std * scale[0].float()
    drawn, same = (torch.Generator().manual_seed(3) for _ in range(2))
    for t, time in enumerate(scheduler.timesteps):
        assert time.item() == pytest.approx(schedule.time[t].item(), abs=1e-4)
        scheduler.scale_model_input(theirs, time)
        theirs = scheduler.step(OUTPUTS[t], time, theirs, generator=drawn, **options).prev_sample
        z = torch.randn(START.shape, generator=same)
        ours = (
            schedule.sample_coef[t] * ours
            + schedule.output_coef[t] * OUTPUTS[t]
            + schedule.log_std[t].exp() * z
        )
        torch.testing.assert_close(theirs.double(), ours * scale[t + 1], rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("prediction", PREDICTION_TYPES)
@pytest.mark.parametrize(
    ("kind", "spacing", "eta"),
    [
        ("linear", "leading", 0.0),
        ("linear", "trailing", 0.5),
        ("scaled_linear", "trailing", 0.5),
        ("cosine", "leading", 0.5),  # its last levels are too low for an eps network in float32
    ],
)
def test_ddim_of_diffusers(kind: str, spacing: str, eta: float, prediction: str) -> None:
    scheduler = peer(
        "DDIMScheduler",
        beta_schedule=BETA_KINDS[kind],
        prediction_type=PREDICTION_TYPES[prediction],
        timestep_spacing=spacing,
        clip_sample=False,
    )
    betas = schedules.make_betas(kind)
    schedule = schedules.ddim(10, betas=betas, eta=eta, spacing=spacing, prediction=prediction, min_std=1e-20)
    assert_steps(schedule, scheduler, eta=eta)


@pytest.mark.parametrize("large", [False, True])
def test_ddpm_of_diffusers(large: bool) -> None:
    kind = "fixed_large" if large else "fixed_small"
    scheduler = peer("DDPMScheduler", clip_sample=False, variance_type=kind)
    assert_steps(schedules.ddim(10, eta=1.0, large_std=large, min_std=1e-20), scheduler)


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")
def test_euler_ancestral_of_diffusers() -> None:
    """It is DDPM in the coordinates x / signal."""
    schedule = schedules.ddim(10, eta=1.0, spacing="linspace", min_std=1e-20)
    scale = torch.cat((1 / schedule.signal, torch.ones(1)))
    assert_steps(schedule, peer("EulerAncestralDiscreteScheduler"), scale=scale)


def test_edm_euler_of_diffusers() -> None:
    """It is deterministic."""
    assert_steps(schedules.edm(10, eta=0.0, min_std=1e-20), peer("EDMEulerScheduler"))
