"""Exports of finished runs with model cards, and their upload to the Hugging Face Hub.

Imports the tasks' exports; diffusers and huggingface_hub where they are used. Only `push` opens a connection.
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dxmi_ext import tasks
from dxmi_ext.anomaly import export as detectors
from dxmi_ext.anomaly.scores.scoring import Scorer, VectorScorer
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.runs import card, identity
from dxmi_ext.engine.runs.card import Card
from dxmi_ext.engine.runs.identity import settings_of
from dxmi_ext.engine.settings import ConfigError, Settings, setting
from dxmi_ext.images.model import classes_of
from dxmi_ext.images.networks import exchange
from dxmi_ext.method.sampler import GaussianSampler

_REPO = r"[\w.-]+/[\w.-]+"
_OURS = "mit"  # license of the package and of the runs that ship with it
_HERE = "PATH/OF/THIS/FOLDER"
_SAMPLER_USAGE = """\
With dxmi_ext and diffusers installed:

```python
from dxmi_ext.pipeline import DxMIPipeline

images = DxMIPipeline.from_pretrained("{source}")({arguments}).images
```

diffusers alone runs pipeline.py of these files, which imports dxmi_ext:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{source}", custom_pipeline="pipeline", trust_remote_code=True)
```

The number of steps is fixed. `DxMIScheduler.from_pretrained("{source}", subfolder="scheduler")` of
`dxmi_ext.pipeline` loads the scheduler alone."""


class HubError(UserError):
    """The Hub refuses an upload, or cannot be reached."""


@dataclasses.dataclass
class _FileSettings(Settings):
    onnx: bool | None = setting(
        None, "whether a detector is also saved as ONNX; null: if onnx and onnxscript are installed"
    )
    license: str | None = setting(
        None,
        "license of the weights, as the Hub names it (mit, cc-by-4.0); null: not stated",
    )


@dataclasses.dataclass
class ExportSettings(_FileSettings):
    """Settings of the command ``export``."""

    output: str | None = setting(
        None, "folder to create; null: RUN/diffusers, or RUN/detector for a detector", path=True
    )


@dataclasses.dataclass
class PushSettings(_FileSettings):
    """Settings of the command ``push``."""

    repo: str | None = setting(None, "OWNER/NAME of the repository on the Hub; required", pattern=_REPO)
    private: bool | None = setting(
        None, "privacy of a new repository; null: the default of the owner's account"
    )
    message: str = setting("Upload by dxmi push", "message of the commit")


def kind_of(task: ModuleType) -> str:
    """The kind of an export: diffusers, or detector for a task of anomaly detection."""
    return "detector" if hasattr(task, "load_scorer") else "diffusers"


def export(
    run: Path,
    task: ModuleType,
    output: Path,
    *,
    repo: str | None = None,
    onnx: bool | None = None,
    license: str | None = None,
) -> str:
    """Exports a finished run, with a model card.

    Args:
        run: folder of the run.
        task: its task.
        output: new folder.
        repo: OWNER/NAME on the Hub, for the card; None: the export stays a local folder.
        onnx: whether to write a detector as ONNX too; None: if onnx is installed.
        license: identifier of the license of the weights; None: not stated, or that of the package for a run
            that ships with it.

    Returns:
        Lines of Python that load and use the export.

    Raises:
        UserError: the run cannot be exported, or the output exists.
    """
    if run.resolve() in map(Path.resolve, tasks.shipped().values()):
        license = license or _OURS
    name = repo or run.resolve().name
    if hasattr(task, "load_scorer"):
        scorer = task.load_scorer(run, torch.device("cpu"))

        def readme(usage: str) -> str:
            cfg = settings_of(task.Config, run)
            about = _card_of_detector(run, scorer, usage)
            return card.text_of(about, run, cfg, name=name, license=license)

        return detectors.export(scorer, output, onnx=onnx, readme=readme)
    if onnx is not None:
        raise ConfigError(f"onnx must be null unless RUN is a run of anomaly detection, got {onnx}")
    cfg, networks = task.load(run, torch.device("cpu"))
    if not hasattr(networks, "sampler"):
        raise ConfigError(f"RUN must have a sampler of images, got {str(run)!r}")
    if not cfg.algorithm.trains_sampler:
        raise ConfigError(f"RUN must have a trained sampler, got {str(run)!r}")
    exchange.check(networks.sampler)
    about = _card_of_sampler(cfg, networks.sampler, repo or _HERE)
    text = card.text_of(about, run, cfg, name=name, license=license)
    return exchange.export(networks.sampler, output, text)


def push(run: Path, task: ModuleType, cfg: PushSettings, api: Any = None) -> str:
    """Exports a run to a temporary folder and uploads it; files of the same names are replaced.

    Args:
        run, task: as of `export`.
        cfg: settings; ``repo`` is required.
        api: a ``huggingface_hub.HfApi``; None: one with the user's own login.

    Returns:
        Address of the repository.

    Raises:
        ConfigError: no repository is given.
        UserError: see `export`.
        HubError: the Hub refuses the upload or cannot be reached.
    """
    if cfg.repo is None:
        raise ConfigError("repo must be OWNER/NAME, got null")
    import huggingface_hub
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = huggingface_hub.HfApi() if api is None else api
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / kind_of(task)
        export(run, task, folder, repo=cfg.repo, onnx=cfg.onnx, license=cfg.license)
        try:
            address = api.create_repo(cfg.repo, private=cfg.private, exist_ok=True)
            api.upload_folder(repo_id=cfg.repo, folder_path=folder, commit_message=cfg.message)
        except LocalTokenNotFoundError as error:
            raise HubError("the Hub requires a login: run `hf auth login`, or set HF_TOKEN") from error
        except Exception as error:  # its transport's errors have no type of its own
            raise HubError(f"{cfg.repo}: {' '.join(str(error).split())}") from error
    return str(address)


def _card_of_sampler(cfg: Any, sampler: GaussianSampler, source: str) -> Card:
    """The card of a sampler of images."""
    steps, (channels, height, width) = len(sampler.log_std), sampler.data_shape
    classes = classes_of(sampler)
    arguments = "batch_size=16" if classes is None else "batch_size=2, class_labels=[0, 1]"
    data = f" from `{Path(cfg.source.data).name}`" if cfg.source.data else ""
    return Card(
        method=f"A sampler that generates images in {steps} steps, each one evaluation of a U-Net.",
        data=f"Images of {channels} x {height} x {width} pixels in [-1, 1]{data}, "
        + ("without labels." if classes is None else f"with labels of {classes} classes."),
        usage=_SAMPLER_USAGE.format(source=source, arguments=arguments),
        tags=["diffusers", "image-generation", "few-step-diffusion"],
        library="diffusers",
        pipeline="unconditional-image-generation" if classes is None else None,
    )


def _card_of_detector(run: Path, scorer: Scorer | VectorScorer, usage: str) -> Card:
    """The card of an anomaly detector."""
    images = isinstance(scorer, Scorer)
    detector = identity.summary_of(run).get("detector", "dxmi")
    what = "images and their pixels" if images else "rows of numbers"
    return Card(
        method=f"An anomaly detector (`{detector}`). It scores {what}; a score above "
        f"{scorer.threshold:.4g} is anomalous.",
        data="The detector was trained on good data only.",
        usage=f"`detector.json` describes inputs, outputs and thresholds.\n\n```python\n{usage}\n```",
        tags=["anomaly-detection", *(["image-anomaly-detection"] if images else ["tabular"])],
        library="pytorch",
        by_dxmi=detector == "dxmi",
    )
