"""Pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext.engine.output import plots

Image = pytest.importorskip("PIL.Image")


def test_images_are_a_grid_of_their_pixels(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 5)
    plots.images(tmp_path / "a.png", images, columns=2)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2 + 2 * 6, 2 + 2 * 7, 3)
    assert (pixels[2:6, 2:7] == 0).all() and (pixels[2:6, 9:14] == 128).all()
    assert (pixels[8:12, 2:7] == 255).all() and (pixels[:2] == 255).all()
    for bad in (images[0], images[:0], images[:, :2]):
        with pytest.raises(ValueError, match=r"images must be \[n, C, H, W\] .* got shape"):
            plots.images(tmp_path / "b.png", bad)
