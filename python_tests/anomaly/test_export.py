"""Export of trained detectors: torch.export, ONNX, and the command ``export``."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import cli, tasks
from dxmi_ext.anomaly import export
from dxmi_ext.anomaly.detectors.networks import AutoencoderEnergy, SphereAutoencoder
from dxmi_ext.anomaly.features import backbones
from dxmi_ext.anomaly.scores.scoring import Scorer
from dxmi_ext.anomaly.settings import Config

pytest.importorskip("yaml")

SIZE = 16


class Stages(nn.Module):
    """Maps of 8 x 8 and 2 x 2, which have to be resized down and up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3, 2, 1), nn.Conv2d(5, 6, 3, 4, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        first = self.first(x).relu()
        return [first, self.second(first)]


def scorer(*, top_share: float = 0.2) -> Scorer:
    torch.manual_seed(0)
    backbone = backbones.backbone(Stages(), "stages", size=SIZE, grid=4)
    energy = AutoencoderEnergy(SphereAutoencoder(11, 4, 16, 2))
    return Scorer(backbone, energy, threshold=2.5, pixel_threshold=1.5, top_share=top_share)


def pictures(n: int) -> Tensor:
    return torch.randint(256, (n, 3, SIZE, SIZE), dtype=torch.uint8)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "run/model").mkdir(parents=True)
    (tmp_path / "run/config.yaml").write_text("recipe: anomaly\ntask: anomaly\n")
    task = SimpleNamespace(load_scorer=lambda directory, device: scorer().to(device), Config=Config)
    monkeypatch.setattr(tasks, "task_of", lambda _: task)
    return tmp_path / "run"


def test_an_exported_detector_gives_the_scorers_scores(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export", str(run), "onnx=false"]) == 0
    first, *usage = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{run}/detector: ")
    assert usage[0] == "import torch  # images: uint8 [n, 3, 16, 16]"
    for n in (1, 5):
        names = {"images": pictures(n)}
        exec("\n".join(usage), names)
        expected = scorer().maps(names["images"])
        assert expected.shape == (n, 4, 4) and not names["maps"].requires_grad
        torch.testing.assert_close(names["maps"], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(names["scores"], scorer().scores(expected), atol=1e-5, rtol=1e-5)
    about = json.loads((run / "detector/detector.json").read_text())
    assert about["images"] == {"dtype": "uint8", "shape": ["n", 3, 16, 16], "channels": "RGB"}
    assert (about["threshold"], about["pixel_threshold"], about["top_share"]) == (2.5, 1.5, 0.2)
    card = (run / "detector/README.md").read_text(encoding="utf-8")
    assert "- image-anomaly-detection\n" in card and "a score above 2.5 is anomalous" in card
    assert "torch.export.load('detector.pt2')" in card and str(run) not in card
    assert cli.main(["export", str(run), "onnx=false"]) == 2
    assert "output must be a new or empty folder" in capsys.readouterr().err


def test_a_detector_is_a_frozen_copy() -> None:
    of, images = scorer(top_share=0.0), pictures(3)
    detector = export.Detector(of).train()
    expected = of.scores(of.maps(images))
    torch.testing.assert_close(detector(images)[1], expected)
    with torch.no_grad():
        of.energy.scale.fill_(9.0)  # type: ignore[union-attr, operator]
    torch.testing.assert_close(detector(images)[1], expected)
    assert of.energy.scale.requires_grad and not any(p.requires_grad for p in detector.parameters())


def test_a_failed_export_is_an_error_in_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(export, "_has_onnx", lambda: False)
    assert cli.main(["export", str(run), "onnx=true"]) == 2
    assert capsys.readouterr().err == (
        "dxmi export: onnx=true requires onnx and onnxscript: pip install 'dxmi_ext[onnx]'\n"
    )

    def forward(self: Stages, x: Tensor) -> Tensor:
        return x if x.max() > 1e6 else x[:, :2]  # depends on values

    monkeypatch.setattr(Stages, "forward", forward)
    assert cli.main(["export", str(run)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]  # torch prints more before
    assert last.startswith("dxmi export: torch.export cannot export these networks: ")
    assert not (run / "detector").exists()
    monkeypatch.setattr(tasks, "task_of", lambda _: SimpleNamespace())
    assert cli.main(["export", str(run), "onnx=true"]) == 2
    assert "onnx must be null unless RUN is a run of anomaly detection, got True" in capsys.readouterr().err


def test_onnx_gives_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert cli.main(["export", str(run)]) == 0
    assert "onnxruntime.InferenceSession" in capsys.readouterr().out
    session = runtime.InferenceSession(run / "detector/detector.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 5):
        images = pictures(n)
        maps, scores = session.run(["maps", "scores"], {"images": images.numpy()})
        expected = scorer().maps(images)
        torch.testing.assert_close(torch.from_numpy(maps), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.from_numpy(scores), scorer().scores(expected), atol=1e-5, rtol=1e-5)
