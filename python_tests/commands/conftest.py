"""Fixtures for the tests of the commands: a finished run, and a quick evaluation."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import runs
from dxmi_ext.two_d import recipe as two_d
from runs import train

DRAW_PICTURES = two_d.draw_pictures


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with runs.quick():
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with pictures; tests must not modify it."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with runs.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_d, "draw_pictures", DRAW_PICTURES)
        assert train(folder, "tensorboard=true") == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, which tests may modify."""
    return shutil.copytree(finished, tmp_path / "copy")
