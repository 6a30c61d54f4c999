from __future__ import annotations

from pathlib import Path

import pytest

import runs


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run; tests must not modify it."""
    pytest.importorskip("yaml")
    folder = tmp_path_factory.mktemp("finished") / "run"
    with runs.quick():
        assert runs.train(folder) == 0
    return folder
