"""Fixtures and skips shared by all tests."""

from __future__ import annotations

import pytest
import torch

from dxmi_ext import _native


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if not _native.cuda_build():
            pytest.skip("dxmi_ext was built without its CUDA half")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device that has kernels: a test taking it runs once on each."""
    return torch.device(request.param)
