"""log Z from the weights of a sampler's paths: known values, and a grid for the 8 Gaussians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext.method import schedules
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.path_weights import Kernel, log_partition
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.two_d import densities, likelihood
from dxmi_ext.two_d.settings import Config

STD = 0.5 / 1.414  # standard deviation of each of the 8 Gaussians


class Denoiser(nn.Module):
    """The expected noise in x_t given the exact posterior of equal Gaussians."""

    def __init__(self, means: Tensor, schedule: Schedule) -> None:
        super().__init__()
        self.means, self.noise = means, schedule.noise.float()

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        noise = self.noise[timestep, None]
        variance = STD**2 + noise**2
        shares = torch.softmax(-torch.cdist(x, self.means).square() / (2 * variance), 1)
        return noise * (x - shares @ self.means) / variance


class Energy(nn.Module):
    """-w log density, plus a constant."""

    def __init__(self, w: float, constant: float) -> None:
        super().__init__()
        self.w, self.constant = w, constant

    def forward(self, x: Tensor) -> Tensor:
        return self.constant - self.w * densities.log_density("8gaussians", x).float()


def eight_gaussians(steps: int, w: float, constant: float) -> tuple[Networks, Schedule]:
    """The exact sampler of that density, up to the discretization in steps."""
    schedule = schedules.variance_exploding(steps, sigma_max=8.0, sigma_min=0.1, min_std=0.09)
    angles = torch.arange(8) * math.pi / 4
    means = 4 / 1.414 * torch.stack((angles.cos(), angles.sin()), 1)
    sampler = GaussianSampler(Denoiser(means, schedule), schedule, (2,))
    return Networks(sampler, nn.Identity(), Energy(w, constant)), schedule


def test_log_partition_of_the_eight_gaussians_is_that_of_a_grid() -> None:
    networks, schedule = eight_gaussians(30, w=0.05, constant=0.1)
    found = log_partition(networks, 0.05, {"schedule": Kernel.noising(schedule)}, n=2000, seed=0)
    assert likelihood.grid_log_partition(networks, 0.05) == pytest.approx(-2, abs=1e-3)
    assert found["log_partition"] == pytest.approx(-2, abs=4 * found["log_partition_std"])
    assert found["log_partition_std"] < 0.05 and found["ess"] > 0.3
    assert found["elbo"] <= found["log_partition"]


def test_the_kernel_is_the_one_with_the_best_effective_sample_size() -> None:
    networks, schedule = eight_gaussians(6, w=1.0, constant=0.0)
    bad = Kernel(torch.zeros(6), torch.full((6,), -3.0))
    found = log_partition(networks, 1.0, {"bad": bad}, n=500, seed=0)
    assert found["kernel"] in ("velocity", "fitted")
    best = log_partition(networks, 1.0, {"schedule": Kernel.noising(schedule)}, n=500, seed=0)
    assert best["ess"] >= 0.9 * found["ess"]


def test_a_kernel_without_finite_weights_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    networks, _ = eight_gaussians(6, w=1.0, constant=0.0)
    bad = Kernel(torch.zeros(6), torch.full((6,), math.nan))
    found = log_partition(networks, 1.0, {"bad": bad}, n=500, seed=0)
    assert found == log_partition(networks, 1.0, {}, n=500, seed=0)
    networks.energy_network = Energy(w=math.nan, constant=0.0)
    with pytest.raises(ArithmeticError, match="finite weights by one of velocity, fitted, got none"):
        log_partition(networks, 1.0, {}, n=500, seed=0)
    cfg = Config.of({"steps": 6})
    assert likelihood.evaluate(cfg, networks, paths=500, seed=0) == {}
    assert "log Z and log-likelihood: skipped" in capsys.readouterr().err
    assert "log Z nan" in likelihood.table({})


def test_noising_kernels_keep_the_levels_of_a_schedule() -> None:
    for schedule in (schedules.ddim(7, eta=1.0), schedules.edm(7)):
        kernel = Kernel.noising(schedule)
        x, level = 1.0, 0.0  # x_T: signal and noise
        for t in reversed(range(7)):
            coef, std = float(kernel.coef[t]), math.exp(float(kernel.log_std[t]))
            x, level = coef * x, math.hypot(coef * level, std)
            assert x == pytest.approx(float(schedule.signal[t]), rel=1e-4)
            assert level == pytest.approx(float(schedule.noise[t]), rel=1e-4)


def test_samplers_whose_paths_have_no_density_are_rejected() -> None:
    networks, _ = eight_gaussians(3, w=1.0, constant=0.0)
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        log_partition(networks, 0, {}, n=10, seed=0)
    networks.sampler.start = nn.Identity()
    with pytest.raises(ValueError, match="paths have no density"):
        log_partition(networks, 1.0, {}, n=10, seed=0)
