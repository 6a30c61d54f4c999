"""Solvers of the probability flow ODE, against diffusers' DPM-Solver++ and exact solutions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.method import schedules
from dxmi_ext.method.solvers import SOLVERS, SolverSampler, dpm_solver, karras_sigmas, time_in_table

KEY = ops.noise_key(3)
STD = 0.6


def exact(x: Tensor, sigma: float) -> Tensor:
    """The mean of data ~ N(0, STD^2) given data + sigma eps."""
    return STD**2 / (STD**2 + sigma**2) * x


def predicted(kind: str, preserving: bool) -> torch.nn.Module:
    """A network whose predictions are exact for such data; its time is sigma."""

    class Network(torch.nn.Module):
        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            sigma = time[0].item()
            signal = (1 + sigma**2) ** -0.5 if preserving else 1.0
            tables = (torch.tensor([level], dtype=torch.float64) for level in (signal, sigma * signal))
            skip, out, scale = schedules.reading(kind, *tables, STD)
            noisy = x / scale.item()
            return ((exact(noisy / signal, sigma) - skip.item() * noisy) / out.item()).to(x.dtype)

    return Network()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(("kind", "preserving"), [("edm", False), ("eps", True), ("v", True), ("x", True)])
def test_gaussian_data_follow_the_exact_flow(solver: str, kind: str, preserving: bool) -> None:
    """The flow scales x by the ratio of standard deviations. Errors fall as the square of the steps."""
    largest, errors = 10.0, []
    for steps in (20, 40):
        sampler = SolverSampler(
            predicted(kind, preserving),
            SOLVERS[solver],
            karras_sigmas(steps, 0.01, largest),
            time=lambda sigma: sigma,
            prediction=kind,
            sigma_data=STD,
            preserving=preserving,
            data_shape=(3,),
        )
        samples = sampler.sample(5, KEY, batch_size=2)
        assert sampler.sample(0, KEY).shape == (0, 3)
        expected = largest * ops.normal((5, 3), KEY) * STD / math.hypot(STD, largest)
        errors.append((samples / expected - 1).abs().max().item())
    assert errors[1] < 0.01 and errors[1] < errors[0] / 3


def test_dpm_solver_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers", reason="the solver to compare with is of diffusers")
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(
        sigma_min=0.01, sigma_max=20.0, sigma_data=STD, euler_at_final=False, lower_order_final=True
    )
    scheduler.set_timesteps(6)
    start = 20 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        return torch.tanh(exact(x, sigma))

    x = start
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas, strict=False):
        scaled = scheduler.scale_model_input(x, t)
        skip, out = STD**2 / (sigma**2 + STD**2), sigma * STD / (sigma**2 + STD**2) ** 0.5
        assert torch.allclose(scaled, x / (sigma**2 + STD**2) ** 0.5)
        x = scheduler.step((denoise(x, sigma.item()) - skip * x) / out, t, x).prev_sample
    torch.testing.assert_close(dpm_solver(denoise, start, scheduler.sigmas.tolist()), x, rtol=1e-5, atol=1e-5)


def test_the_time_of_a_discrete_diffusion() -> None:
    betas = schedules.make_betas()
    alpha_bar = (1 - betas).cumprod(0)
    time, least, largest = time_in_table(betas)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert time(sigma[400].item()) == pytest.approx(400) and time(least) == 0
    assert time(largest) == pytest.approx(999) and 400 < time((sigma[400] + sigma[401]).item() / 2) < 401
