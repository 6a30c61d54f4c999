"""A trained detector as one module for other programs: torch.export, and ONNX where onnx is installed.

Inside is all from pictures of the backbone's size on; bringing files to that size stays outside, for bicubic
resizing with antialiasing is no operation of ONNX. Imports torch and ``dxmi_ext``; onnx and onnxscript (extra
``onnx``) where they are used.
"""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext import __version__, files
from dxmi_ext.anomaly import detectors
from dxmi_ext.anomaly.scoring import ScoreError, Scorer, maps_of
from dxmi_ext.runlog import write_json


class Detector(nn.Module):
    """uint8 images [n, 3, size, size], RGB -> score maps [n, h, w] and scores [n], as of a `Scorer`.

    It is a frozen copy.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(scorer.backbone.network)  # without the checks of an Extractor
        self.preparation, self.energy = copy.deepcopy((scorer.preparation, scorer.energy))
        self.top_share = scorer.top_share
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = maps_of(self.preparation(self.backbone(images)), self.energy)
        return maps, detectors.detect(maps, top_share=self.top_share)


def export(scorer: Scorer, output: Path, *, onnx: bool | None = None) -> str:
    """Writes detector.pt2, detector.onnx and detector.json (size and thresholds), complete or not at all.

    Args:
        scorer: on the CPU.
        output: new folder.
        onnx: whether with ONNX; None: if it is installed.

    Returns:
        the lines of Python that score by them.

    Raises:
        UserError: something lies at the output already, or onnx is wanted and missing.
        ScoreError: the network cannot be exported, or what was exported gives other scores.
    """
    with_onnx = _has_onnx() if onnx is None else onnx
    if with_onnx and not _has_onnx():
        raise ScoreError("onnx: got true, wants onnx and onnxscript: pip install 'dxmi_ext[onnx]'")
    files.check_new(output)
    shape = 3, scorer.size, scorer.size
    images = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    detector = Detector(scorer)
    program = _exported(detector, images[:2])
    maps, scores = program.module()(images)  # another n than it was exported with
    wanted = scorer.maps(images)
    for got, want in ((maps, wanted), (scores, scorer.scores(wanted))):
        if not torch.allclose(got, want, rtol=1e-5, atol=1e-5):
            raise ScoreError(f"exported: scores differ by up to {float((got - want).abs().max()):.2g}")
    about = {
        "images": {"dtype": "uint8", "shape": ["n", *shape], "channels": "RGB"},
        "resizing": "the whole picture to that size: bicubic, antialiased, as Image.resize of Pillow does",
        "outputs": {"maps": ["n", *wanted.shape[1:]], "scores": ["n"]},
        "threshold": scorer.threshold,
        "pixel_threshold": scorer.pixel_threshold,
        "top_share": scorer.top_share,
        "backbone": scorer.backbone.identity,
        "versions": {"dxmi_ext": __version__, "torch": torch.__version__},
    }
    with files.folder(output.resolve()) as folder:
        torch.export.save(program, folder / "detector.pt2")
        if with_onnx:
            _save_onnx(program, folder / "detector.onnx")
        write_json(folder / "detector.json", about)
    usage = [
        f"import torch  # images: uint8 {['n', *shape]}".replace("'", ""),
        f"maps, scores = torch.export.load({str(output / 'detector.pt2')!r}).module()(images)",
    ]
    if with_onnx:
        usage += [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({str(output / 'detector.onnx')!r})",
            'maps, scores = session.run(None, {"images": images.numpy()})',
        ]
    return "\n".join(usage)


def _exported(detector: Detector, images: Tensor) -> Any:
    batch = {"images": {0: torch.export.Dim("n", min=1)}}
    try:
        return torch.export.export(detector, (images,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # of many kinds
        raise ScoreError(f"exported: torch.export does not take these networks: {_brief(error)}") from error


def _save_onnx(program: Any, path: Path) -> None:
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["maps", "scores"]}
    try:
        made = torch.onnx.export(program, dynamo=True, verbose=False, **names)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ScoreError(f"onnx: does not take these networks, so onnx=false: {_brief(error)}") from error
    assert made is not None
    made.save(str(path))


def _brief(error: Exception) -> str:
    """Without its pages of explanations."""
    return str(error).strip().partition("\n")[0]


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))
