"""Adds a run to the weights that ship with the package: ship_weights.py RUN NAME.

Writes dxmi_ext/images/weights/NAME: the averaged networks of a finished image run in float16, the settings
that `dxmi sample NAME` and `dxmi evaluate NAME` read, and a model card with the run's figures. It omits
frozen encoders, whose weights the start has, and the untrained energy of a pretrained network.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from dxmi_ext.engine.runs import config
from dxmi_ext.engine.runs.identity import settings_of, summary_of
from dxmi_ext.engine.storage import folders
from dxmi_ext.images import evaluation, model, recipe
from dxmi_ext.images.settings import Config

BASE_RECIPE = "fashion-mnist-t10 start=none"
WEIGHTS = Path(__file__).parents[1] / "dxmi_ext/images/weights"
CARD = """\
# {name}

{about}

- Data: Fashion-MNIST (Xiao et al. 2017; MIT license), training split, 28 x 28 gray images in [-1, 1].
- License: that of dxmi_ext.
- Weights: averaged, float16, safetensors.
- Made by: `{command}`

{figures}
"""
BASE = """\
A diffusion model (EDM preconditioning, 1.1M parameters, patches of 2 x 2 pixels), from which
`fashion-mnist-t10` and `fashion-mnist-t4` start."""
SAMPLER = """\
A sampler of {steps} steps and its energy, trained by DxMI from `fashion-mnist-base`. The energy is heads on
the encoder of that network."""


def main(run: Path, name: str) -> None:
    cfg = settings_of(Config, run)
    trained = (run / "summary.json").is_file()
    folder = WEIGHTS / name
    (folder / "model").mkdir(parents=True, exist_ok=True)
    about = json.loads((run / "model/config.json").read_text(encoding="utf-8"))
    weights = load_file(run / "model/model.safetensors")
    if trained:
        weights = {key: weight for key, weight in weights.items() if ".encoder." not in key}
        changes: dict[str, Any] = {"start": "fashion-mnist-base"}
    else:
        changes = {"energy_network": "resnet", "energy_width": 1, "pretrain_batch_size": cfg.run.batch_size}
        changes["features"] = "efflite0,classifier"
        cfg = cfg.replace(**changes)
        torch.manual_seed(0)  # the same file each time: units of experiments identify it by its digest
        network, diffusion = model.network_of(cfg, tuple(about["data_shape"]), about["classes"])
        small = model.networks_of(cfg, network, tuple(about["data_shape"]), about["classes"], diffusion)
        sampler = {key: weight for key, weight in weights.items() if key.startswith("sampler.")}
        weights = small.state_dict() | sampler
    anywhere = {"output": None, "threads": 0, "device": "auto", "precision": "float32", "compile": False}
    config.save(cfg.replace(recipe=name, **changes, **anywhere), folder / "config.yaml")
    # Tables of times and noise levels need float32; norms and biases are small.
    halves = {key: (w.half() if w.ndim > 1 else w).contiguous() for key, w in weights.items()}
    save_file(halves, folder / "model/model.safetensors")
    (folder / "model/config.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    folders.mark(folder, "run", data=recipe.fingerprints_of(evaluation.load_data(cfg)))
    command = (
        f"dxmi train {cfg.run.recipe} seed={cfg.run.seed}" if trained else f"dxmi pretrain {BASE_RECIPE}"
    )
    how = f"precision={cfg.execution.precision} compile={json.dumps(cfg.execution.compile)}"
    card = CARD.format(
        name=name,
        about=SAMPLER.format(steps=cfg.chain.steps) if trained else BASE,
        command=f"{command} {how}",
        figures=_figures(summary_of(run)) if trained else "Its figures are in docs/results/fashion-mnist.",
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    (folder / "model/model.safetensors").chmod(0o644)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()):,} bytes")


def _figures(summary: dict[str, Any]) -> str:
    """Frechet distances, precision and recall of samples and test images."""
    rows = ["| | the sampler | test images |", "|---|---|---|"]
    for name, value in summary.items():
        floor = summary.get(f"{name}_floor")
        if floor is not None and name.startswith(("fd_", "precision_", "recall_")):
            rows.append(f"| {name} | {value:.3g} | {floor:.3g} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
