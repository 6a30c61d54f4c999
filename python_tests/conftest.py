"""Fixtures and skips shared by all tests."""

from __future__ import annotations

import pytest
import torch

import emulation
from dxmi_ext import _gradients, _native, ops


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if reason := _native.cuda_status():
            pytest.skip(reason)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test with the fixture `device` runs on its module's DEVICES, by default all devices with kernels;
    "emulated" stands for the CUDA kernels on the CPU."""
    if "device" in metafunc.fixturenames:
        names = list(getattr(metafunc.module, "DEVICES", ("cpu", "cuda")))
        if "set_threads" in metafunc.fixturenames:
            names.remove("emulated")
        gpu = pytest.param("cuda", marks=pytest.mark.gpu)
        metafunc.parametrize("device", [gpu if n == "cuda" else n for n in names], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """The device of the test's tensors. For "emulated", the public functions call the emulated ops."""
    if request.param != "emulated":
        return torch.device(request.param)
    emulation.load()
    for module in (ops, _gradients):
        monkeypatch.setattr(module, "_ops", torch.ops.dxmi_emulated)
    return torch.device("cpu")
