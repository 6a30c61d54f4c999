"""Networks to and from diffusers folders, for the commands ``export`` and ``convert``.

``anomaly.export`` exports detectors. Imports torch and ``dxmi_ext``; diffusers where used.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from dxmi_ext.engine.settings import ConfigError, Settings, setting
from dxmi_ext.engine.storage import files, folders
from dxmi_ext.images.networks import convert
from dxmi_ext.images.networks.unet import UNet
from dxmi_ext.method.sampler import GaussianSampler, Timed


@dataclasses.dataclass
class ConvertSettings(Settings):
    """Settings of the command ``convert``."""

    kind: str | None = setting(
        None,
        "kind of network: EDM (ADM architecture), a consistency model, or its EDM teacher; required",
        choices=tuple(convert.KINDS),
    )
    output: str | None = setting(None, "folder to create; null: CHECKPOINT without its suffix", path=True)
    image_size: int | None = setting(
        None,
        "image size in pixels, for kinds other than edm; null: such that the lowest level is 8 x 8",
        minimum=1,
        maximum=4096,
    )
    head_channels: int = setting(64, "channels of an attention head", minimum=1, maximum=16384)


def check(sampler: GaussianSampler) -> UNet:
    """The U-Net of a sampler that can be exported.

    Raises:
        ConfigError: the sampler has another kind of network.
    """
    network = sampler.network
    if not (isinstance(network, Timed) and isinstance(network.network, UNet)):
        raise ConfigError(
            f"RUN must have a sampler with a U-Net, got one with a {type(network).__name__}, "
            "which diffusers does not support"
        )
    return network.network


def export(sampler: GaussianSampler, output: Path, readme: str) -> str:
    """Saves a sampler of a U-Net as a diffusers pipeline, atomically; see `dxmi_ext.pipeline`.

    Args:
        sampler: the sampler.
        output: new folder.
        readme: text of its README.md.

    Returns:
        The lines of Python that load it and sample from it.

    Raises:
        UserError: the output exists, or the sampler has another kind of network.
    """
    unet = check(sampler)
    folders.check_new(output)
    from dxmi_ext import pipeline

    with files.folder(output.resolve()) as folder:
        pipeline.save_pretrained(folder, unet.model, sampler, unet.patch)
        (folder / "README.md").write_text(readme, encoding="utf-8")
    what = "batch_size=16" if unet.classes is None else "batch_size=2, class_labels=[0, 1]"
    return (
        "from dxmi_ext.pipeline import DxMIPipeline\n"
        f"images = DxMIPipeline.from_pretrained({str(output)!r})({what}).images"
    )


def convert_checkpoint(checkpoint: Path, cfg: ConvertSettings) -> Path:
    """Converts a checkpoint to a diffusers folder and returns its path; see `images.networks.convert`.

    Raises:
        ConfigError: no kind is given.
        UserError: the output exists; and see `images.networks.convert`.
    """
    if cfg.kind is None:
        raise ConfigError(f"kind must be one of {', '.join(convert.KINDS)}, got null")
    output = Path(cfg.output) if cfg.output else checkpoint.with_suffix("")
    folders.check_new(output)
    convert.convert(
        checkpoint, cfg.kind, output.resolve(), image_size=cfg.image_size, head_channels=cfg.head_channels
    )
    return output
