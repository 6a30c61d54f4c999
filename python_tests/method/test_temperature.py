"""The temperature that follows the data's entropy."""

from __future__ import annotations

import math

import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method.temperature import Temperature, entropy_gap


def points(n: int, seed: int, std: float = 1.0) -> torch.Tensor:
    return std * ops.normal((n, 2), ops.noise_key(seed))


def test_the_gap_is_that_of_the_entropies() -> None:
    data = points(200, 1)
    assert entropy_gap(data, data) == 0
    torch.testing.assert_close(entropy_gap(data, 0.5 * data), torch.tensor(math.log(2)), rtol=1e-5, atol=0)
    # For Gaussians, it is the mean log ratio of the standard deviations.
    gap = entropy_gap(points(2000, 1), points(2000, 2, std=2.0))
    assert gap.item() == pytest.approx(-math.log(2), abs=0.06)


def test_one_row_has_no_neighbor() -> None:
    with pytest.raises(ConfigError, match="a batch must have at least 2 rows with tau_rate, got 1"):
        Temperature(0.1, torch.tensor(1.0)).update(points(1, 1), points(1, 2))


def test_neighbors_are_sought_in_groups_of_128() -> None:
    data, samples = points(512, 1), points(512, 2, std=0.5)
    groups = [entropy_gap(*each) for each in zip(data.split(128), samples.split(128), strict=True)]
    torch.testing.assert_close(entropy_gap(data, samples), torch.stack(groups).mean())
    # Four copies a thousandth apart count as one point, since no group holds two of them. Among all rows they
    # would be the third nearest neighbors, and the gap would be about 4.
    copies = points(128, 3).repeat(4, 1) + 1e-3 * torch.arange(4.0).repeat_interleave(128)[:, None]
    assert entropy_gap(points(512, 4), copies).abs() < 0.2


def test_tau_rises_where_samples_are_too_close_and_falls_where_they_are_not() -> None:
    data, temperature = points(50, 1), Temperature(0.1, torch.tensor(1.0))
    shown = temperature.update(data, data / math.e)
    torch.testing.assert_close(temperature.factor, torch.tensor(math.exp(0.1)))
    torch.testing.assert_close(shown["entropy_gap"], torch.tensor(1.0))
    temperature.update(data, data * math.e)
    torch.testing.assert_close(temperature.factor, torch.tensor(1.0))
    roomier = Temperature(0.1, torch.tensor(1.0), margin=0.5)
    for done, total in ((0.0, 0.05), (0.5, 0.1), (0.75, 0.125), (1.0, 0.125)):  # a margin that shrinks
        roomier.at(done)
        roomier.update(data, data)
        torch.testing.assert_close(roomier.factor, torch.tensor(math.exp(total)))


def test_a_few_copies_in_the_data_do_not_outweigh_the_other_rows() -> None:
    data, samples = points(100, 1), points(100, 2)
    gap = entropy_gap(data, samples)
    data[:4] = data[0]
    assert (entropy_gap(data, samples) - gap).abs() < 0.3
    Temperature(0.1, torch.tensor(1.0)).check(data)
    with pytest.raises(
        ConfigError, match=r"tau_rate must be 0 .* repeated points, .* copies of 100 of its 100"
    ):
        Temperature(0.1, torch.tensor(1.0)).check(data[:20].repeat(5, 1))


def test_non_finite_entropies_leave_tau_unchanged() -> None:
    data, temperature = points(50, 1), Temperature(0.1, torch.tensor(1.0))
    for samples in (data * math.nan, data * math.inf):
        temperature.update(data, samples)
        assert temperature.factor == 1
    for _ in range(15):  # all samples are at one point
        temperature.update(data, torch.zeros_like(data))
    assert temperature.factor == 1000
    with pytest.raises(ValueError, match=r"data, samples must have one shape .* got \[50, 2\], \[3, 2\]"):
        entropy_gap(data, data[:3])
