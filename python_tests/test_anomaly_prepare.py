"""Preparation of feature maps, against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dxmi_ext.anomaly.features import FeatureMaps
from dxmi_ext.anomaly.prepare import Preparation
from dxmi_ext.metrics.features import FeatureError


def _maps(n: int = 80, seed: int = 0) -> FeatureMaps:
    """More pictures than are seen at a time; channels mixed and of unequal scales, places with means."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, 3, 4, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    place = np.arange(12).reshape(3, 4, 1)
    return FeatureMaps((mixed * [1, 10, 0.1, 3, 1] + place + 100).astype(np.float32))


def _pooled(maps: np.ndarray) -> np.ndarray:
    out, (height, width) = np.empty(maps.shape), maps.shape[1:3]
    for i in range(height):
        for j in range(width):
            out[:, i, j] = maps[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
    return out


@pytest.mark.parametrize("aligned", [False, True])
def test_further_coordinate_tells_the_mahalanobis_distance_of_neighbourhood_means(aligned: bool) -> None:
    train, test = _maps(), _maps(70, seed=2)
    preparation = Preparation(train.shape, patch=3, aligned=aligned, shrinkage=0.1, constant=0.5)
    preparation.fit(train)
    prepared = preparation.prepare(test).maps.astype(np.float64)

    pooled = _pooled(train.maps.astype(np.float64))
    axes = 0 if aligned else (0, 1, 2)
    mean = pooled.mean(axes)
    own = ((pooled - mean) ** 2).mean(0)
    overall = own.mean((0, 1))
    std = np.sqrt((own + overall) / 2 if aligned else overall)
    rows = ((pooled - mean) / std).reshape(-1, 5)
    correlation = 0.9 * rows.T @ rows / len(rows) + 0.1 * np.eye(5)
    x = (_pooled(test.maps.astype(np.float64)) - mean) / std
    sq_distance = np.einsum("nhwc,cd,nhwd->nhw", x, np.linalg.inv(correlation), x)
    constant = 0.5 * np.sqrt(5)
    assert preparation.dim == 6 and prepared.shape == (70, 3, 4, 6)
    np.testing.assert_allclose(np.linalg.norm(prepared, axis=3), 1, atol=1e-3)
    np.testing.assert_allclose(prepared[..., 5], constant / np.sqrt(sq_distance + constant**2), atol=2e-3)


def test_without_a_constant_whitened_directions_are_left() -> None:
    maps = _maps()
    preparation = Preparation(maps.shape, patch=1, shrinkage=1e-6, constant=0)
    preparation.fit(maps)
    rows = preparation.prepare(maps).rows.astype(np.float64)
    assert rows.shape[1] == preparation.dim == 5
    # a cloud that is round in every direction; without whitening one of ten times the scale leads
    np.testing.assert_allclose(rows.T @ rows / len(rows), np.eye(5) / 5, atol=0.05)


def test_a_channel_that_never_changes_harms_nothing() -> None:
    maps = _maps()
    maps.maps[..., 2] = 7
    preparation = Preparation(maps.shape)
    preparation.fit(maps)
    assert np.isfinite(preparation.prepare(maps).maps).all()


def test_its_buffers_are_all_that_it_learned() -> None:
    maps = _maps()
    learned, other = Preparation(maps.shape, aligned=True), Preparation(maps.shape, aligned=True)
    learned.fit(maps)
    other.load_state_dict(learned.state_dict())
    a, b = learned.prepare(maps), other.prepare(maps)
    np.testing.assert_array_equal(a.maps, b.maps)
    assert a.fingerprint == b.fingerprint != Preparation(maps.shape).prepare(maps).fingerprint


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="got patch=2"):
        Preparation((3, 4, 5), patch=2)
    with pytest.raises(FeatureError, match=r"got \(3, 4, 5\), preparation wants \(3, 4, 6\)"):
        Preparation((3, 4, 6)).fit(_maps())
    assert torch.equal(Preparation((3, 4, 5)).whitening, torch.eye(5))
