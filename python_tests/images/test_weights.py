"""The trained networks that ship with the package."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dxmi_ext import cli, tasks
from dxmi_ext.images import model

for library in ("diffusers", "yaml", "PIL"):
    pytest.importorskip(library)


def test_they_are_small_and_have_cards() -> None:
    files = [path for folder in tasks.shipped().values() for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8e6
    for folder in tasks.shipped().values():
        card = (folder / "README.md").read_text(encoding="utf-8")
        assert "license" in card and "Made by: `dxmi " in card


@pytest.mark.parametrize("name", tasks.shipped())
def test_they_draw_images_that_vary(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`dxmi sample NAME` writes to the current folder; the energy has the encoder of the base."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", name, "n=4", "device=cpu", "output=grid.png"]) == 0
    assert (tmp_path / "grid.png").stat().st_size > 500
    cfg, networks, _ = model.load(tasks.shipped()[name], torch.device("cpu"))
    key = torch.tensor([0, 0])
    with torch.no_grad():
        samples = networks.sampler.sample(4, key)
        assert samples.shape == (4, 1, 28, 28) and samples.clamp(-1, 1).var(0).mean() > 0.05
        assert networks.energy(samples).isfinite().all()
    if cfg.networks.energy_network == "encoder":
        _, base, _ = model.load(tasks.shipped()["fashion-mnist-base"], torch.device("cpu"))
        pretrained = base.sampler.network.network.model.state_dict()
        encoder = {key: weight for key, weight in networks.value.state_dict().items() if "encoder." in key}
        assert encoder
        for key, weight in encoder.items():
            assert torch.equal(weight, pretrained[key.partition("encoder.")[2]]), key
