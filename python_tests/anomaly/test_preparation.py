"""Preparation of feature maps, against plain numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest

from dxmi_ext.anomaly.features.preparation import Whitened, make, prepared


def _maps(n: int = 80, seed: int = 0) -> np.ndarray:
    """More maps than a chunk; correlated channels of different scales, and a mean for each position."""
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(n, 3, 4, 5)) @ np.random.default_rng(1).normal(size=(5, 5))
    place = np.arange(12).reshape(3, 4, 1)
    return (mixed * [1, 10, 0.1, 3, 1] + place + 100).astype(np.float32)


def _pooled(maps: np.ndarray) -> np.ndarray:
    out, (height, width) = np.empty(maps.shape), maps.shape[1:3]
    for i in range(height):
        for j in range(width):
            out[:, i, j] = maps[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean((1, 2))
    return out


@pytest.mark.parametrize("aligned", [False, True])
def test_the_last_coordinate_encodes_the_mahalanobis_distance_of_neighborhood_means(aligned: bool) -> None:
    train, test = _maps(), _maps(70, seed=2)
    preparation = Whitened((3, 4, 5), patch=3, aligned=aligned)
    preparation.shrinkage = 0.1
    preparation.fit(train)
    points = prepared(test, preparation).maps.astype(np.float64)

    pooled = _pooled(train.astype(np.float64))
    axes = 0 if aligned else (0, 1, 2)
    mean = pooled.mean(axes)
    std = np.sqrt(((pooled - mean) ** 2).mean((0, 1, 2)))
    rows = (pooled - mean) / std
    own = np.einsum("nhwc,nhwd->hwcd", rows, rows) / len(rows)
    overall = own.mean((0, 1))
    correlations = 0.9 * ((own + overall) / 2 if aligned else overall + 0 * own) + 0.1 * np.eye(5)
    x = (_pooled(test.astype(np.float64)) - mean) / std
    sq_distance = np.einsum("nhwc,hwcd,nhwd->nhw", x, np.linalg.inv(correlations), x)
    assert points.shape == (70, 3, 4, 6)
    np.testing.assert_allclose(np.linalg.norm(points, axis=3), 1, rtol=1e-6)
    np.testing.assert_allclose(points[..., 5], np.sqrt(5 / (sq_distance + 5)), rtol=1e-4)


def test_a_channel_that_never_changes_harms_nothing() -> None:
    maps = _maps()
    maps[..., 2] = 7
    preparation = Whitened((3, 4, 5))
    preparation.fit(maps)
    points = prepared(maps, preparation).maps
    np.testing.assert_allclose(points[..., 2], 0, atol=1e-6)
    assert np.isfinite(points).all()


def test_buffers_hold_all_fitted_values() -> None:
    learned, other = (Whitened((3, 4, 5), aligned=True) for _ in range(2))
    learned.fit(_maps())
    other.load_state_dict(learned.state_dict())
    np.testing.assert_array_equal(prepared(_maps(), learned).maps, prepared(_maps(), other).maps)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="patch must be odd and >= 1, got 2"):
        Whitened((3, 4, 5), patch=2)


@pytest.mark.parametrize("aligned", [False, True])
def test_unit_and_centered_features_are_directions_of_neighborhood_means(aligned: bool) -> None:
    train, test = _maps(), _maps(70, seed=2)
    pooled = _pooled(train.astype(np.float64))
    mean = pooled.mean(0 if aligned else (0, 1, 2))
    for name, offset in (("unit", 0 * mean), ("centered", mean)):
        preparation = make(name, (3, 4, 5), patch=3, aligned=aligned)
        preparation.fit(train)
        x = _pooled(test.astype(np.float64)) - offset
        expected = x / np.linalg.norm(x, axis=3, keepdims=True)
        found = prepared(test, preparation).maps
        assert preparation.dim == 5 and found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_directions_do_not_depend_on_length() -> None:
    """Rows of any magnitude in float64; a row of zeros has no direction and stays zero."""
    rows = np.array([[3.0, 4], [3e100, 4e100], [3e-100, 4e-100], [0, 0]])[:, None, None]
    unit = make("unit", (1, 1, 2))
    unit.fit(rows)
    expected = [[0.6, 0.8]] * 3 + [[0, 0]]
    np.testing.assert_allclose(prepared(rows, unit).rows, expected, rtol=1e-6)
