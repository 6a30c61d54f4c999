"""Reading and writing U-Nets in diffusers folders, with their diffusion. Pickles are never loaded.

Imports torch and ``dxmi_ext``; diffusers, and huggingface_hub for a source named ``hub:``, where used.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.storage import files
from dxmi_ext.images.networks.unet import UNet, check_shape
from dxmi_ext.method import schedules

HUB = "hub:"
_WEIGHTS = "diffusion_pytorch_model"
_SCHEDULER = "scheduler_config.json"
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_EDM_SCHEDULERS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_CONSISTENCY_SCHEDULER = "CMStochasticIterativeScheduler"
_PIPELINES = {_CONSISTENCY_SCHEDULER: "ConsistencyModelPipeline", "DDPMScheduler": "DDPMPipeline"}


class DDPM(NamedTuple):
    """A network of a discrete variance-preserving diffusion; its time is an index into betas."""

    betas: Tensor
    """float64 [steps], in the order of the forward process."""
    prediction: Literal["epsilon", "sample", "v_prediction"]
    """What it predicts: the noise, the data, or sqrt(abar) noise - sqrt(1 - abar) data."""


class EDM(NamedTuple):
    """A network of Karras et al. 2022, Table 1, which predicts F from data + sigma eps."""

    sigma_data: float = 0.5
    """Standard deviation of the data."""
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    """Range of noise levels in training."""
    time_scale: float = 1.0
    """Factor of the network's time ln(sigma) / 4; 1000 in consistency models."""
    boundary: bool = False
    """Whether it is a consistency function, D(x; sigma_min) = x (Song et al. 2023, appendix C)."""

    def time(self, sigma: Tensor) -> Tensor:
        """The network's time at noise levels."""
        return self.time_scale * sigma.log() / 4

    def input_scale(self, sigma: Tensor) -> Tensor:
        """Factor of the network's input at noise levels."""
        return (sigma**2 + self.sigma_data**2).rsqrt()


class Pretrained(NamedTuple):
    """A network and its diffusion."""

    network: UNet
    diffusion: DDPM | EDM | None
    """None: the folder has no scheduler."""


def load(source: str | Path, data_shape: Sequence[int], classes: int | None = None) -> Pretrained:
    """Read a U-Net from a diffusers folder.

    Args:
        source: folder of a U-Net (config.json and safetensors) or of a pipeline with one; or
            ``hub:OWNER/NAME``, which is downloaded.
        data_shape: shape (C, H, W) of the data, which the network must match.
        classes: number of classes of the data; None: unconditional.

    Raises:
        UserError: the folder, its safetensors or some weights are missing, a config is incomplete, or the
            network is of another kind or does not fit the data.
    """
    root = _download(source) if isinstance(source, str) and source.startswith(HUB) else Path(source)
    folder = root / "unet" if (root / "unet").is_dir() else root
    config, scheduler = _read_config(folder), _read_scheduler(root)
    try:
        _check_data(folder, config, tuple(data_shape), classes)
        diffusion = None if scheduler is None else read_diffusion(scheduler)
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"{root}: a config has a missing or invalid entry: {error}") from error
    return Pretrained(_read_network(folder), diffusion)


def save(network: UNet, path: Path, scheduler: Mapping[str, object]) -> None:
    """Write the folder of a diffusers pipeline, atomically, for `load` and diffusers.

    Args:
        network: network to save to unet/, as safetensors.
        path: a new or empty folder.
        scheduler: config of the scheduler, with its class in "_class_name".
    """
    name = scheduler["_class_name"]
    with files.folder(Path(path)) as folder:
        network.model.save_pretrained(folder / "unet", safe_serialization=True)
        (folder / "scheduler").mkdir()
        _write_json(folder / "scheduler" / _SCHEDULER, scheduler)
        if name in _PIPELINES:  # EDM's schedulers have no pipeline for a bare U-Net
            parts = {"unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", name]}
            _write_json(folder / "model_index.json", {"_class_name": _PIPELINES[str(name)], **parts})


def read_diffusion(scheduler: Mapping[str, Any]) -> DDPM | EDM:
    """The diffusion in a diffusers scheduler's config; missing settings have diffusers' defaults.

    "time_scale" is this package's addition to the configs of EDM's schedulers: `EDM.time_scale`.

    Raises:
        UserError: the scheduler or a setting is not supported.
    """
    name = scheduler.get("_class_name")
    if name in _EDM_SCHEDULERS or name == _CONSISTENCY_SCHEDULER:
        consistency = name == _CONSISTENCY_SCHEDULER
        if scheduler.get("prediction_type", "epsilon") != "epsilon":
            raise UserError(f"{name}: prediction_type must be epsilon, got {scheduler['prediction_type']}")
        return EDM(
            sigma_data=float(scheduler.get("sigma_data", 0.5)),
            sigma_min=float(scheduler.get("sigma_min", 0.002)),
            sigma_max=float(scheduler.get("sigma_max", 80.0)),
            time_scale=1000.0 if consistency else float(scheduler.get("time_scale", 1.0)),
            boundary=consistency,
        )
    if not {"beta_start", "beta_schedule", "trained_betas"} & scheduler.keys():
        raise UserError(
            f"scheduler must be one with betas, one of EDM's or {_CONSISTENCY_SCHEDULER}, got {name}"
        )
    if scheduler.get("rescale_betas_zero_snr"):
        raise UserError(f"{name}: rescale_betas_zero_snr is not supported")
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in _PREDICTIONS:
        raise UserError(f"{name}: prediction_type must be one of {', '.join(_PREDICTIONS)}, got {prediction}")
    return DDPM(_betas(scheduler), prediction)


def _betas(scheduler: Mapping[str, Any]) -> Tensor:
    """float64 [steps]; diffusers computes them in float32."""
    if (trained := scheduler.get("trained_betas")) is not None:
        return torch.tensor(trained, dtype=torch.float64)
    steps = int(scheduler.get("num_train_timesteps", 1000))
    first, last = float(scheduler.get("beta_start", 1e-4)), float(scheduler.get("beta_end", 0.02))
    kind = scheduler.get("beta_schedule", "linear")
    if kind in ("linear", "scaled_linear"):
        return schedules.make_betas(kind, steps=steps, start=first, end=last)
    if kind == "sigmoid":
        ramp = torch.linspace(-6, 6, steps, dtype=torch.float64).sigmoid()
        return first + (last - first) * ramp
    if kind == "squaredcos_cap_v2":
        return schedules.make_betas("cosine", steps=steps)
    raise UserError(f"beta_schedule must be linear, scaled_linear, sigmoid or squaredcos_cap_v2, got {kind}")


def _download(source: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", f"{_WEIGHTS}*.safetensors", "unet/*.safetensors"]
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=wanted))
    except (OSError, ValueError) as error:  # base classes of the hub's errors
        raise UserError(f"{source}: {error}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: expected a diffusers folder of a U-Net or a pipeline, but config.json is missing"
        )
    config = _read_json(folder / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        raise UserError(f"{folder}: expected a UNet2DModel, got {config.get('_class_name')}")
    if not any(folder.glob(f"{_WEIGHTS}*.safetensors")):
        pickles = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        got = "only pickled weights, which are not read" if pickles else "no weights"
        raise UserError(f"{folder}: expected {_WEIGHTS}.safetensors, got {got}")
    return config


def _check_data(
    folder: Path, config: Mapping[str, Any], data_shape: tuple[int, ...], classes: int | None
) -> None:
    try:
        channels, height, width = check_shape(data_shape, len(config["block_out_channels"]))
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from error
    pair = config["in_channels"], config["out_channels"]
    if pair != (channels, channels):
        raise UserError(f"{folder}: expected a network of {channels} channels, got {pair[0]} to {pair[1]}")
    size = config.get("sample_size")
    if size is not None:
        trained = (size, size) if isinstance(size, int) else tuple(size)
        if trained != (height, width):
            raise UserError(
                f"{folder}: expected a network for images of {(height, width)}, got one for {trained}"
            )
    if config.get("class_embed_type") is not None:
        raise UserError(f"{folder}: class_embed_type {config['class_embed_type']} is not supported")
    if config.get("num_class_embeds") != classes:
        got = config.get("num_class_embeds") or "no"
        raise UserError(f"{folder}: expected a network of {classes or 'no'} classes, got {got}")


def _read_network(folder: Path) -> UNet:
    from diffusers import UNet2DModel

    try:
        model, report = UNet2DModel.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{folder}: {textwrap.shorten(str(error), 300)}") from error
    if wrong := [*report["missing_keys"], *report["unexpected_keys"]]:
        raise UserError(f"{folder}: weights and config.json disagree, among others on {wrong[0]}")
    return UNet(model)


def _read_scheduler(root: Path) -> dict[str, Any] | None:
    beside = (root.parent / "scheduler",) if root.name == "unet" else ()
    for folder in (root / "scheduler", root, *beside):
        if (folder / _SCHEDULER).is_file():
            return _read_json(folder / _SCHEDULER)
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(dict(content), indent=2) + "\n", encoding="utf-8")
