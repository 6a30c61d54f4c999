"""Model cards: the README.md of an exported run, in the format of the Hugging Face Hub.

Imports the engine; PyYAML where a card is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dxmi_ext import __version__
from dxmi_ext.engine.run_settings import RunnableConfig
from dxmi_ext.engine.runs import identity

# Numbers of a summary that describe the execution, not the result.
_NO_FIGURES = {"seed", "world_size", "batch_size_per_rank", "iterations", "wall_seconds"}
_NO_FIGURES |= {"rollbacks", "skipped_steps"}
# Settings of a machine, of logs and of checkpoints, which say nothing about the model.
_LOCAL = {"recipe", "task", "seed", "device", "threads", "wandb", "tensorboard", "dry_run"}
_LOCAL |= {"checkpoint_every", "keep_checkpoints", "log_every", "picture_every"}

_BY_DXMI = """\
Trained by DxMI, Diffusion by Maximum Entropy Inverse Reinforcement Learning (Yoon et al., [NeurIPS
2024](https://arxiv.org/abs/2407.00626)), with"""
_PLAIN = "Fitted with"
_NO_LICENSE = """\
No license of these weights has been stated. The code of dxmi_ext, which loads them, has the MIT license."""
_CITATION = """\
```bibtex
@inproceedings{yoon2024dxmi,
  title = {Maximum Entropy Inverse Reinforcement Learning of Diffusion Models with Energy-Based Models},
  author = {Yoon, Sangwoong and Hwang, Himchan and Kwon, Dohyun and Noh, Yung-Kyun and Park, Frank C.},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2024}
}
```"""


class Card(NamedTuple):
    """What the task of a run says about its export."""

    method: str
    """One or two sentences about the model."""
    data: str
    """One or two sentences about the training data."""
    usage: str
    """Markdown that shows how to load and use the files."""
    tags: Sequence[str]
    library: str | None = None
    """The Hub's library_name."""
    pipeline: str | None = None
    """The Hub's pipeline_tag."""
    by_dxmi: bool = True
    """Whether the model was trained by DxMI."""


def text_of(card: Card, run: Path, cfg: RunnableConfig, *, name: str, license: str | None) -> str:
    """The text of a model card.

    Args:
        card: the task's part.
        run: folder of the run; its summary.json has the figures. A run that ships with the package has a
            README.md instead.
        cfg: settings of the run.
        name: name of the model.
        license: identifier of the Hub for the license of the weights, such as "mit"; None: not stated.
    """
    import yaml

    front: dict[str, Any] = {"license": license, "library_name": card.library, "pipeline_tag": card.pipeline}
    front = {key: value for key, value in front.items() if value is not None}
    front["tags"] = ["dxmi", *card.tags]
    by = _BY_DXMI if card.by_dxmi else _PLAIN
    by += f" dxmi_ext {__version__}, recipe `{cfg.run.recipe}`, seed {cfg.run.seed}."
    sections = {
        "Use": card.usage,
        "Method": f"{card.method}\n\n{by}\n\n{_settings(cfg)}",
        "Data": card.data,
        "Figures": _figures(run),
        "License": _NO_LICENSE if license is None else f"`{license}`",
        **({"Citation": _CITATION} if card.by_dxmi else {}),
    }
    body = "\n\n".join(f"## {title}\n\n{text}" for title, text in sections.items())
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {name}\n\n{body}\n"


def _settings(cfg: RunnableConfig) -> str:
    """The settings that differ from the defaults of the task, without paths."""
    keys, values = cfg.keys(), cfg.flat()
    shown = {
        key: values[key]
        for key, about in keys.items()
        if values[key] != about.default and not about.metadata["path"] and key not in _LOCAL
    }
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in shown.items()]
    return "Settings that differ from the defaults:\n\n```yaml\n" + "\n".join(lines) + "\n```"


def _figures(run: Path) -> str:
    """The numbers of the summary as a table."""
    summary = identity.summary_of(run)
    if not summary:
        readme = run / "README.md"
        about = readme.read_text(encoding="utf-8").partition("\n")[2].strip() if readme.is_file() else ""
        return about or "This run has no summary.json."
    rows = ["| | |", "|---|---|"]
    for key, value in _numbers(summary):
        rows.append(f"| {key} | {value:.4g} |")
    return "\n".join(rows) if len(rows) > 2 else "The run computed no figures."


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    """The numbers of a summary, also those one level down."""
    found = []
    for key, value in summary.items():
        if isinstance(value, dict) and not prefix and key != "versions":
            found += _numbers(value, f"{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool) and key not in _NO_FIGURES:
            found.append((prefix + key, float(value)))
    return found
