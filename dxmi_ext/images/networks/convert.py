"""Conversion of checkpoints of ADM networks (Dhariwal & Nichol 2021) to diffusers folders.

Supports two layouts of the architecture: guided-diffusion's, used by consistency models (Song et al. 2023)
and their EDM teachers, and EDM's (Karras et al. 2022). Networks without an exact counterpart in UNet2DModel
are rejected: DDPM++ and NCSN++ (attention in some blocks of a level only, scaled skips), resampling by
convolutions, resampling filters other than the mean of 2 x 2 pixels, learned variances, norms with different
numbers of groups.

Imports torch and ``dxmi_ext``; safetensors and diffusers where used.
"""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.data.contents import refuse_pointer
from dxmi_ext.images.networks import pretrained
from dxmi_ext.images.networks.adm_layouts import EDM, Consistency
from dxmi_ext.images.networks.unet import UNet

_EDM_SCHEDULER = {
    "_class_name": "EDMEulerScheduler",
    "sigma_min": 0.002,
    "sigma_max": 80.0,
    "sigma_data": 0.5,
}
# Scheduler config of each kind of checkpoint; see `pretrained.read_diffusion`.
KINDS: dict[str, dict[str, object]] = {
    "edm": _EDM_SCHEDULER,
    "consistency": {
        **_EDM_SCHEDULER,
        "_class_name": "CMStochasticIterativeScheduler",
        "num_train_timesteps": 40,
    },
    "consistency-teacher": {**_EDM_SCHEDULER, "time_scale": 1000.0},
}


def convert(
    path: Path | str,
    kind: str,
    out_folder: Path | str,
    *,
    image_size: int | None = None,
    head_channels: int = 64,
) -> None:
    """Convert a checkpoint to a folder for `pretrained.load` and diffusers.

    Args:
        path: file of a state dict, in safetensors or written by torch.save; only tensors are unpickled.
        kind: "edm": an EDM network of the ADM architecture; "consistency": a consistency model;
            "consistency-teacher": an EDM network published with them.
        out_folder: a new or empty folder.
        image_size: size in pixels for kinds other than "edm", whose checkpoints lack it. By default such that
            the lowest level has 8 x 8 pixels, as in the published 64 and 256.
        head_channels: channels of an attention head; 64 in published checkpoints.

    Raises:
        UserError: the file or kind does not exist, a size is given for an EDM network, or the network has no
            exact counterpart.
    """
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "edm" and image_size is not None:
        raise UserError(f"image_size must be null with kind=edm, whose checkpoints have it, got {image_size}")
    state = _read(Path(path))
    try:
        if kind == "edm":
            network = from_edm(state, head_channels=head_channels)
        else:
            network = from_consistency(state, image_size=image_size, head_channels=head_channels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # tensors of other shapes
        raise UserError(f"{path}: not a checkpoint of this kind: {error}") from error
    pretrained.save(network, Path(out_folder), KINDS[kind])


def from_consistency(
    state: dict[str, Tensor], *, image_size: int | None = None, head_channels: int = 64
) -> UNet:
    """The network of a state dict of a consistency model or its teacher; see `convert`.

    Guided-diffusion's own checkpoints have the same layout and shapes, but another order of queries, keys and
    values; the published ones are rejected for their learned variances.
    """
    return Consistency(state, image_size, head_channels).network()


def from_edm(state: dict[str, Tensor], *, head_channels: int = 64) -> UNet:
    """The network of a state dict of EDM, with or without its preconditioning wrapper; see `convert`.

    The map of augmentation labels is dropped, since sampling does not use it.
    """
    return EDM(state, head_channels).network()


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: does not exist")
    refuse_pointer(path, UserError)
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path}: pickled objects are not loaded. Save the network's state_dict() as safetensors with "
            "the code that wrote it"
        ) from error
    except Exception as error:  # any error for a file of another kind
        raise UserError(f"{path}: not a state dict: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        raise UserError(f"{path}: expected a state dict, of names and tensors alone")
    return state
