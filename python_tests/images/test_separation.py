"""AUROC of an energy for test images against other images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.networks.unet import Architecture, unet
from dxmi_ext.images.separation import separation
from dxmi_ext.method import schedules
from dxmi_ext.method.networks import Networks, TimeIndependent
from dxmi_ext.method.sampler import GaussianSampler, Timed

pytest.importorskip("diffusers")
CPU = torch.device("cpu")


class Smoothness(nn.Module):
    """An energy that decreases with the differences of neighboring pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return -x.diff(dim=-1).abs().mean((1, 2, 3))


def networks(classes: int | None = None) -> Networks:
    schedule = schedules.fastdpm(3)
    network = unet(Architecture(8, (1, 2), blocks=1, attention=()), (1, 8, 8), classes)
    sampler = GaussianSampler(Timed(network, schedule), schedule, (1, 8, 8))
    return Networks(sampler, TimeIndependent(Smoothness()))


def stripes(n: int) -> ImageData:
    pixels = np.zeros((n, 1, 8, 8), np.uint8)
    pixels[..., ::2] = np.random.default_rng(0).integers(200, 256, (n, 1, 8, 1))
    return ImageData(pixels)


def test_noise_blurred_and_other_images_are_ranked(tmp_path: Path) -> None:
    """Stripes are rougher than noise, so noise has higher energies; equal images cannot be separated."""
    same = tmp_path / "same.npz"
    np.savez(same, test_x=stripes(300).images[:, 0], train_x=stripes(4).images[:, 0])
    whole = tmp_path / "whole.npy"  # without splits
    np.save(whole, stripes(300).images[:, 0])
    found = separation(networks(), stripes(300), f"noise,blurred,{same},{whole}", 300, seed=0, device=CPU)
    assert found == {"auroc_noise": 1.0, "auroc_blurred": 1.0, "auroc_same": 0.5, "auroc_whole": 0.5}


def test_a_subset_of_sorted_images_is_random() -> None:
    """The first half of the test images is flat: blurring leaves these as they are."""
    images = stripes(300).images
    images[:150] = 0
    found = separation(networks(), ImageData(images), "noise, blurred", 100, seed=0, device=CPU)
    assert found.keys() == {"auroc_noise", "auroc_blurred"} and found["auroc_blurred"] > 0.55


def test_other_images_are_read_as_those_of_the_run(tmp_path: Path) -> None:
    """They are resized to the run's size and cached."""
    larger, cache = tmp_path / "larger.npy", tmp_path / "cache"
    np.save(larger, stripes(5).images[:, 0].repeat(2, 1).repeat(2, 2))
    options = {"seed": 0, "device": CPU, "size": 8, "cache": str(cache)}
    found = separation(networks(), stripes(5), str(larger), 5, **options)  # type: ignore[arg-type]
    assert found == {"auroc_larger": 0.5} and any(cache.iterdir())


def test_what_cannot_be_compared(tmp_path: Path) -> None:
    other = tmp_path / "other.npz"
    np.savez(other, test_x=np.zeros((5, 4, 4), np.uint8), train_x=np.zeros((5, 4, 4), np.uint8))
    with pytest.raises(ConfigError, match=r"against must be images of shape \[1, 8, 8\], got"):
        separation(networks(), stripes(5), str(other), 5, seed=0, device=CPU)
    with pytest.raises(ConfigError, match="against must name images with different names, got noise,noise"):
        separation(networks(), stripes(5), "noise,noise", 5, seed=0, device=CPU)
    with pytest.raises(ConfigError, match="against must be null for a run that is conditional on classes"):
        separation(networks(classes=3), stripes(5), "noise", 5, seed=0, device=CPU)
