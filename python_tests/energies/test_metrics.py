"""Metrics of samplers of an energy against known values."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.energies import metrics
from dxmi_ext.energies.annealing import annealed, line
from dxmi_ext.energies.targets import TARGETS, Target, mixture
from dxmi_ext.energies.tempering import tempered
from dxmi_ext.method.path_weights import of_reverse_weights, of_weights


def test_weights_of_normal_logs() -> None:
    """Where log w ~ N(m, s^2): log mean w = m + s^2 / 2, mean log w = m, ESS = exp(-s^2)."""
    z = ops.normal((200_000,), ops.noise_key(0), dtype=torch.float64)
    found = of_weights(3 + 0.5 * z)
    assert found["log_partition"] == pytest.approx(3.125, abs=4 * found["log_partition_std"])
    assert found["elbo"] == pytest.approx(3, abs=0.005)
    assert found["ess"] == pytest.approx(math.exp(-0.25), abs=0.01)
    assert found["log_partition_std"] == pytest.approx(math.sqrt((math.exp(0.25) - 1) / 200_000), rel=0.03)
    # Under w pi the same log w ~ N(m + s^2, s^2).
    reverse = of_reverse_weights(3.25 + 0.5 * z)
    assert reverse["eubo"] == pytest.approx(3.25, abs=0.005)
    assert reverse["ess_reverse"] == pytest.approx(math.exp(-0.25), abs=0.01)


@pytest.mark.parametrize("value", [-700.0, 2.0**60])
def test_equal_weights_are_exact(value: float) -> None:
    found = of_weights(torch.full((10,), value))
    assert found == {"log_partition": pytest.approx(value), "log_partition_std": 0, "elbo": value, "ess": 1}


def test_wasserstein_known_values() -> None:
    x = ops.normal((50, 3), ops.noise_key(0))
    assert metrics.wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    assert metrics.wasserstein(x, x + torch.tensor([3.0, 4.0, 0.0])) == pytest.approx(5, abs=1e-5)
    with pytest.raises(ValueError, match=r"y must have the shape of x, \[50, 3\], got \[49, 3\]"):
        metrics.wasserstein(x, x[1:])


def test_sliced_wasserstein_known_values() -> None:
    x = ops.normal((50, 3), ops.noise_key(0))
    assert metrics.sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-6)
    moved = metrics.sliced_wasserstein(x, x + torch.tensor([3.0, 4.0, 0.0]))
    assert moved == pytest.approx(5 / math.sqrt(3), rel=0.05)  # the mean square of a unit vector's part


def test_aligned_wasserstein_ignores_rotation_reflection_and_permutation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "_ALIGNMENTS", 40)  # enough for the global minimum of every pair
    x = ops.normal((6, 9), ops.noise_key(0), dtype=torch.float64)
    turn = torch.linalg.qr(ops.normal((3, 3), ops.noise_key(1), dtype=torch.float64)).Q
    turn[:, 0] *= -turn.det().sign()  # a reflection
    moved = (x.view(6, 3, 3)[:, [2, 0, 1]] @ turn).flatten(1).flip(0)
    assert metrics.wasserstein(x, moved) > 1
    assert metrics.aligned_wasserstein(x, moved, 3) == pytest.approx(0, abs=1e-6)
    centered = x.view(6, 3, 3) - x.view(6, 3, 3).mean(1, keepdim=True)
    size = float(centered.square().sum((1, 2)).mean().sqrt())
    assert metrics.aligned_wasserstein(x, 0 * x, 3) == pytest.approx(size, rel=1e-6)


def test_total_variation_known_values() -> None:
    x = torch.arange(100.0)
    assert metrics.total_variation(x, x.flip(0), 0, 100) == 0
    assert metrics.total_variation(x, x + 1000, 0, 200) == pytest.approx(1)
    assert metrics.total_variation(x, x + 50, 0, 200) == pytest.approx(0.5)
    assert metrics.total_variation(x, torch.full((3,), math.nan), 0, 200) == pytest.approx(1)


def test_modes() -> None:
    target = TARGETS["gmm9"]()
    assert target.modes is not None and target.draw is not None
    every = metrics.of_modes(target.draw(900, ops.noise_key(0), 0), target)
    assert every["modes"] == every["modes_true"] == 9 and every["mode_entropy"] > 0.99
    three = metrics.of_modes(target.modes[:3].repeat(10, 1), target)
    assert three["modes"] == 3 and three["mode_entropy"] == pytest.approx(0.5)
    assert metrics.of_modes(target.modes + 2.5, target)["modes"] == 0  # between the modes


def test_annealed_importance_sampling_finds_a_known_log_partition() -> None:
    target = mixture("two", torch.tensor([[-1.0, 0.0], [2.0, 0.0]]), 0.3)
    moved = dataclasses.replace(target, energy=lambda x: 2 * (target.energy(x) + 3))
    found = annealed(moved, 2.0, 3.0, ops.noise_key(0), n=500, levels=200)
    assert found["ais_log_partition"] == pytest.approx(-3, abs=4 * found["ais_log_partition_std"])
    assert found["ais_ess"] > 0.3 and found["ais_evaluations"] == 100_500


@pytest.mark.parametrize("wall", [math.inf, math.nan])
def test_particles_behind_a_wall_have_no_weight(wall: float) -> None:
    """With an energy of inf or NaN on half of the plane, the ELBO is -inf; if skipped, it prints as nan."""
    half = Target("half", 2, lambda x: x.square().sum(1) / 2 + torch.where(x[:, 0] > 0, wall, 0.0))
    found = annealed(half, 1.0, 1.5, ops.noise_key(0), n=500, levels=50)
    assert found["ais_log_partition"] == pytest.approx(
        math.log(math.pi), abs=4 * found["ais_log_partition_std"]
    )
    assert found.pop("ais_elbo") == -math.inf
    assert "ELBO nan, ESS 0." in line(found, 50)


def test_parallel_tempering_finds_a_known_log_partition_and_modes() -> None:
    target = mixture("two", torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.3)
    moved = dataclasses.replace(target, energy=lambda x: 2 * (target.energy(x) + 3))
    found, samples = tempered(moved, 2.0, 3.0, ops.noise_key(0), sweeps=200)
    assert found["tempering_log_partition"] == pytest.approx(-3, abs=4 * found["tempering_log_partition_std"])
    assert found["tempering_log_partition_std"] < 0.05
    assert found["tempering_evaluations"] == 201 * 2000
    assert samples.shape == (2000, 2)
    assert float((samples[:, 0] > 0).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert float(samples[:, 1].var()) == pytest.approx(0.3, abs=0.05)
