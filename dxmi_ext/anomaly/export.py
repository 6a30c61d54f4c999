"""Export of a trained detector as one module for other programs: torch.export, and ONNX if onnx is installed.

The module takes rows of numbers or images of the backbone's size. It does not resize images, because ONNX has
no bicubic resizing with antialiasing. Imports torch, numpy and
``dxmi_ext``; onnx and onnxscript (extra ``onnx``) where they are used.
"""

from __future__ import annotations

import copy
import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dxmi_ext import __version__
from dxmi_ext.anomaly.data import vectors
from dxmi_ext.anomaly.detectors import common
from dxmi_ext.anomaly.features.preparation import Preparation
from dxmi_ext.anomaly.scores.scoring import ScoreError, Scorer, VectorScorer
from dxmi_ext.engine.output.runlog import write_json
from dxmi_ext.engine.storage import files, folders


class Detector(nn.Module):
    """uint8 images [n, 3, size, size], RGB -> score maps [n, h, w] and scores [n], as from a `Scorer`.

    It is a frozen copy.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(scorer.backbone.network)  # without the checks of an Extractor
        self.preparation, self.energy = copy.deepcopy((scorer.preparation, scorer.energy))
        self.top_share = scorer.top_share
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        maps = common.maps_of(self.preparation(self.backbone(images)), self.energy)
        return maps, common.detect(maps, top_share=self.top_share)


class VectorDetector(nn.Module):
    """float64 rows [n, d] -> scores [n], as from a `VectorScorer`. It is a frozen copy."""

    def __init__(self, scorer: VectorScorer) -> None:
        super().__init__()
        self.preparation, self.energy = copy.deepcopy((scorer.preparation, scorer.energy))
        columns = scorer.columns
        value, rounded = columns.values()
        tensors = {"varying": np.delete(np.arange(columns.total), list(columns.constants))}
        if columns.constants:  # torch.export cannot save empty tensors
            constant = np.array(list(columns.constants), np.int64)
            tensors |= {"constant": constant, "value": value, "rounded": rounded}
        for name, array in tensors.items():
            self.register_buffer(name, torch.from_numpy(array))
        self.has_constants = bool(columns.constants)
        self.requires_grad_(False).eval()

    varying: Tensor
    constant: Tensor

    def forward(self, rows: Tensor) -> Tensor:
        maps = self.preparation(rows.index_select(1, self.varying)[:, :, None, None])
        scores = common.maps_of(maps, self.energy)[:, 0, 0]
        if not self.has_constants:
            return scores
        apart = vectors.differs(rows.index_select(1, self.constant), self.value, self.rounded)
        return scores.masked_fill(apart, math.inf)


class _Plan(NamedTuple):
    """A module to export, with inputs and outputs for a check, and its description."""

    detector: nn.Module
    inputs: Tensor
    """Inputs for the check; their n differs from that of the export."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    wanted: Callable[[], tuple[Tensor, ...]]
    """Computes the expected outputs with the scorer itself."""
    about: dict[str, Any]
    """Description; the first key is the name of the input."""


def export(
    scorer: Scorer | VectorScorer,
    output: Path,
    *,
    onnx: bool | None = None,
    readme: Callable[[str], str] | None = None,
) -> str:
    """Writes detector.pt2, detector.onnx and detector.json (input and thresholds) atomically.

    Args:
        scorer: scorer on the CPU.
        output: new folder.
        onnx: whether to write ONNX; None: if it is installed.
        readme: text of README.md, given lines of Python that use the files in the current folder; None: no
            README.md.

    Returns:
        Lines of Python that use the exported detector.

    Raises:
        UserError: the output exists already, or onnx is requested and missing.
        ScoreError: the network cannot be exported, or the exported module gives other scores.
    """
    with_onnx = _has_onnx() if onnx is None else onnx
    if with_onnx and not _has_onnx():
        raise ScoreError("onnx=true requires onnx and onnxscript: pip install 'dxmi_ext[onnx]'")
    folders.check_new(output)
    plan = _plan_of_vectors(scorer) if isinstance(scorer, VectorScorer) else _plan_of_images(scorer)
    name, names = next(iter(plan.about)), plan.outputs
    program = _exported(plan.detector, plan.inputs[:2], name)
    found, wanted = program.module()(plan.inputs), plan.wanted()
    for got, want in zip([found] if len(names) == 1 else found, wanted, strict=True):
        if not torch.allclose(got, want, rtol=1e-5, atol=1e-5):
            difference = float((got - want).abs().max())
            raise ScoreError(f"exported scores must equal the run's, got a difference of {difference:.2g}")
    about = {
        **plan.about,
        "outputs": {key: ["n", *want.shape[1:]] for key, want in zip(names, wanted, strict=True)},
        "threshold": scorer.threshold,
        "versions": {"dxmi_ext": __version__, "torch": torch.__version__},
    }
    with files.folder(output.resolve()) as folder:
        torch.export.save(program, folder / "detector.pt2")
        if with_onnx:
            _save_onnx(program, folder / "detector.onnx", name, names)
        write_json(folder / "detector.json", about)
        if readme is not None:
            text = readme(_usage(plan, Path(), with_onnx))
            (folder / "README.md").write_text(text, encoding="utf-8")
    return _usage(plan, output, with_onnx)


def _usage(plan: _Plan, folder: Path, with_onnx: bool) -> str:
    """Lines of Python that use an exported detector."""
    (name, given), names = next(iter(plan.about.items())), plan.outputs
    usage = [
        f"import torch  # {name}: {given['dtype']} {given['shape']}".replace("'", ""),
        f"{', '.join(names)} = torch.export.load({str(folder / 'detector.pt2')!r}).module()({name})",
    ]
    if with_onnx:
        outputs = ", ".join(names) if len(names) > 1 else f"{names[0]},"
        usage += [
            "import onnxruntime",
            f"session = onnxruntime.InferenceSession({str(folder / 'detector.onnx')!r})",
            f'{outputs} = session.run(None, {{"{name}": {name}.numpy()}})',
        ]
    return "\n".join(usage)


def _plan_of_images(scorer: Scorer) -> _Plan:
    shape = 3, scorer.size, scorer.size
    images = torch.randint(256, (3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def wanted() -> tuple[Tensor, Tensor]:
        maps = scorer.maps(images)
        return maps, scorer.scores(maps)

    about = {
        "images": {"dtype": "uint8", "shape": ["n", *shape], "channels": "RGB"},
        "resizing": "the whole image to that size: bicubic, antialiased, as Image.resize of Pillow does",
        "pixel_threshold": scorer.pixel_threshold,
        "top_share": scorer.top_share,
        "backbone": scorer.backbone.identity,
    }
    return _Plan(Detector(scorer), images, ("maps", "scores"), wanted, about)


def _plan_of_vectors(scorer: VectorScorer) -> _Plan:
    """The check uses rows like the good ones; the last differs in the constant columns."""
    columns, prepares = scorer.columns, scorer.preparation
    assert isinstance(prepares, Preparation)
    mean, std = prepares.mean.flatten().numpy(), prepares.std.flatten().numpy()
    random = np.random.default_rng(0)
    rows = np.empty((5, columns.total))
    rows[:, list(columns.constants)] = columns.values()[0]
    rows[-1, list(columns.constants)] += 1 + np.abs(columns.values()[0])
    varying = np.delete(np.arange(columns.total), list(columns.constants))
    rows[:, varying] = mean + std * random.normal(size=(5, len(varying)))
    about = {
        "rows": {"dtype": "float64", "shape": ["n", columns.total]},
        "constant_columns": columns.to_json()["constants"],
    }
    inputs = torch.from_numpy(rows)
    return _Plan(VectorDetector(scorer), inputs, ("scores",), lambda: (scorer.scores(rows),), about)


def _exported(detector: nn.Module, inputs: Tensor, name: str) -> Any:
    batch = {name: {0: torch.export.Dim("n", min=1)}}
    try:
        return torch.export.export(detector, (inputs,), dynamic_shapes=batch, strict=False)
    except Exception as error:  # torch.export raises many types
        raise ScoreError(f"torch.export cannot export these networks: {_brief(error)}") from error


def _save_onnx(program: Any, path: Path, name: str, outputs: Sequence[str]) -> None:
    try:
        made = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=[name], output_names=list(outputs)
        )
    except torch.onnx.errors.OnnxExporterError as error:
        raise ScoreError(
            f"torch.onnx cannot export these networks, use onnx=false: {_brief(error)}"
        ) from error
    assert made is not None
    made.save(str(path))


def _brief(error: Exception) -> str:
    """The first line of an error message."""
    return str(error).strip().partition("\n")[0]


def _has_onnx() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxscript"))
