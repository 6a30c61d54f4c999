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
import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images import pretrained
from dxmi_ext.images.contents import refuse_pointer
from dxmi_ext.images.unet import Architecture, UNet, unet_config

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
        out_folder: folder to write, replaced if it exists.
        image_size: size in pixels for kinds other than "edm", whose checkpoints lack it. By default such that
            the lowest level has 8 x 8 pixels, as in the published 64 and 256.
        head_channels: channels of an attention head; 64 in published checkpoints.

    Raises:
        UserError: the file or kind does not exist, or the network has no exact counterpart.
    """
    if kind not in KINDS:
        raise UserError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    state = _read(Path(path))
    try:
        if kind == "edm":
            network = from_edm(state, head_channels=head_channels)
        else:
            network = from_consistency(state, image_size=image_size, head_channels=head_channels)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    pretrained.save(network, Path(out_folder), KINDS[kind])


def from_consistency(
    state: dict[str, Tensor], *, image_size: int | None = None, head_channels: int = 64
) -> UNet:
    """The network of a state dict of a consistency model or its teacher; see `convert`.

    Guided-diffusion's own checkpoints have the same layout and shapes, but another order of queries, keys and
    values; the published ones are rejected for their learned variances.
    """
    return _Consistency(state, image_size, head_channels).network()


def from_edm(state: dict[str, Tensor], *, head_channels: int = 64) -> UNet:
    """The network of a state dict of EDM, with or without its preconditioning wrapper; see `convert`.

    The map of augmentation labels is dropped, since sampling does not use it.
    """
    return _EDM(state, head_channels).network()


class _Checkpoint:
    """An ADM network described by a state dict; subclasses implement the layouts."""

    RESNET: ClassVar[dict[str, str]]
    """Layers of a residual block: names in diffusers, and in the checkpoint."""
    ATTENTION: ClassVar[dict[str, str]]
    """Layers of an attention without the joint projection "qkv"."""
    others: dict[str, str]
    """The other layers without the class embedding."""
    channels: list[int]
    """Channels of each level."""
    attends: list[bool]
    """Whether each level has attention."""
    blocks: int
    """Number of residual blocks per level on the way down; one more on the way up."""
    image_size: int
    classes: int | None
    scale_shift: bool
    groups: int

    def __init__(self, state: dict[str, Tensor], head_channels: int) -> None:
        self.left, self.head_channels = dict(state), head_channels

    # Names of a residual block and of the attention after it, by the position in diffusers.
    def down(self, level: int, i: int) -> tuple[str, str]:
        raise NotImplementedError

    def downsampler(self, level: int) -> str:
        raise NotImplementedError

    def middle(self) -> tuple[str, str, str]:
        """The first block, the attention, the second block."""
        raise NotImplementedError

    def up(self, k: int, i: int) -> tuple[str, str]:
        """Block i of the k-th level on the way up."""
        raise NotImplementedError

    def upsampler(self, k: int) -> str:
        raise NotImplementedError

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        """Rows of the joint projection -> rows of queries, keys and values, head by head."""
        raise NotImplementedError

    def class_embedding(self) -> Tensor:
        """[classes, 4 width]"""
        raise NotImplementedError

    def network(self) -> UNet:
        from diffusers import UNet2DModel

        config, new = self._config(), self._renamed()
        if self.left:
            raise UserError(f"{next(iter(self.left))} and {len(self.left) - 1} more entries have no place")
        new = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in new.items()}
        with torch.device("meta"):
            model: Any = UNet2DModel(**config)
        try:
            model.load_state_dict(new, assign=True)
        except RuntimeError as error:
            raise UserError(f"does not describe one ADM network: {error}") from error
        return UNet(model.eval())

    def _config(self) -> dict[str, object]:
        width = self.channels[0]
        if any(c % width for c in self.channels):
            raise UserError(f"channels must be multiples of the first level's, got {self.channels}")
        architecture = Architecture(
            width,
            tuple(c // width for c in self.channels),
            self.blocks,
            tuple(self.image_size >> level for level, there in enumerate(self.attends) if there),
            self.head_channels,
            adm=True,
            scale_shift=self.scale_shift,
        )
        inputs = self.shape(f"{self.others['conv_in']}.weight")[1]
        outputs = self.shape(f"{self.others['conv_out']}.weight")[0]
        if inputs != outputs:
            raise UserError(
                f"{outputs} channels from {inputs}: a network with learned variances, or not of images"
            )
        try:
            config = unet_config(architecture, (inputs, self.image_size, self.image_size), self.classes)
        except ValueError as error:
            raise UserError(str(error)) from error
        return config | {"norm_num_groups": self.groups, "attn_norm_num_groups": self.groups}

    def _renamed(self) -> dict[str, Tensor]:
        new: dict[str, Tensor] = {}
        levels = len(self.channels)

        def layers(target: str, source: str, names: dict[str, str]) -> None:
            for name, theirs in names.items():
                for kind in ("weight", "bias"):
                    new[f"{target}{name}.{kind}"] = self.take(f"{source}{theirs}.{kind}")

        def resnet(target: str, source: str) -> None:
            theirs = f"{source}.{self.RESNET['conv_shortcut']}.weight"
            absent = set() if theirs in self.left else {"conv_shortcut"}
            layers(f"{target}.", f"{source}.", {k: v for k, v in self.RESNET.items() if k not in absent})

        def attention(target: str, source: str) -> None:
            layers(f"{target}.", f"{source}.", self.ATTENTION)
            new[f"{target}.to_out.0.weight"] = new[f"{target}.to_out.0.weight"].flatten(1)
            for kind in ("weight", "bias"):
                parts = self.split(self.take(f"{source}.qkv.{kind}"))
                for name, rows in zip(("to_q", "to_k", "to_v"), parts, strict=True):
                    new[f"{target}.{name}.{kind}"] = rows.flatten(1) if kind == "weight" else rows.flatten()

        layers("", "", self.others)
        if self.classes is not None:
            new["class_embedding.weight"] = self.class_embedding()
        for level in range(levels):
            for i in range(self.blocks):
                there, heads = self.down(level, i)
                resnet(f"down_blocks.{level}.resnets.{i}", there)
                if self.attends[level]:
                    attention(f"down_blocks.{level}.attentions.{i}", heads)
            if level < levels - 1:
                resnet(f"down_blocks.{level}.downsamplers.0", self.downsampler(level))
        first, heads, second = self.middle()
        resnet("mid_block.resnets.0", first)
        attention("mid_block.attentions.0", heads)
        resnet("mid_block.resnets.1", second)
        for k in range(levels):
            for i in range(self.blocks + 1):
                there, heads = self.up(k, i)
                resnet(f"up_blocks.{k}.resnets.{i}", there)
                if self.attends[levels - 1 - k]:
                    attention(f"up_blocks.{k}.attentions.{i}", heads)
            if k < levels - 1:
                resnet(f"up_blocks.{k}.upsamplers.0", self.upsampler(k))
        return new

    def shape(self, name: str) -> torch.Size:
        if name not in self.left:
            raise UserError(f"{name} is missing; not a checkpoint of this kind")
        return self.left[name].shape

    def take(self, name: str) -> Tensor:
        self.shape(name)
        tensor = self.left.pop(name)
        return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


class _Consistency(_Checkpoint):
    """Layout with numbered blocks: the first convolution, then each level's blocks and the resampling one."""

    RESNET: ClassVar = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "time_emb_proj": "emb_layers.1",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "conv_shortcut": "skip_connection",
    }
    ATTENTION: ClassVar = {"group_norm": "norm", "to_out.0": "proj_out"}

    def __init__(self, state: dict[str, Tensor], image_size: int | None, head_channels: int) -> None:
        super().__init__(state, head_channels)
        if any(re.search(r"blocks\.\d+\.\d\.(op|conv)\.weight$", name) for name in state):
            raise UserError("resamples by convolutions (resblock_updown=False), which is not supported")
        count = len({name.split(".")[1] for name in state if name.startswith("input_blocks.")})
        # A resampling block looks like any other; on the way up it follows another one.
        levels = 1 + sum(bool(re.match(r"output_blocks\.\d+\.[12]\.in_layers\.0\.weight", n)) for n in state)
        if count < 2 * levels or count % levels:
            raise UserError(f"{count} input_blocks for {levels} levels; not a checkpoint of this kind")
        self.blocks = count // levels - 1
        starts = [self.down(level, 0)[0] for level in range(levels)]
        self.channels = [self.shape(f"{start}.out_layers.3.weight")[0] for start in starts]
        self.attends = [f"{self.down(level, 0)[1]}.qkv.weight" in state for level in range(levels)]
        self.image_size = 8 << (levels - 1) if image_size is None else image_size
        self.classes = self.shape("label_emb.weight")[0] if "label_emb.weight" in state else None
        self.scale_shift = self.shape(f"{starts[0]}.emb_layers.1.weight")[0] == 2 * self.channels[0]
        self.groups = 32
        self.others = {
            "time_embedding.linear_1": "time_embed.0",
            "time_embedding.linear_2": "time_embed.2",
            "conv_in": "input_blocks.0.0",
            "conv_norm_out": "out.0",
            "conv_out": "out.2",
        }

    def down(self, level: int, i: int) -> tuple[str, str]:
        number = 1 + level * (self.blocks + 1) + i
        return f"input_blocks.{number}.0", f"input_blocks.{number}.1"

    def downsampler(self, level: int) -> str:
        return self.down(level, self.blocks)[0]

    def middle(self) -> tuple[str, str, str]:
        return "middle_block.0", "middle_block.1", "middle_block.2"

    def up(self, k: int, i: int) -> tuple[str, str]:
        number = k * (self.blocks + 1) + i
        return f"output_blocks.{number}.0", f"output_blocks.{number}.1"

    def upsampler(self, k: int) -> str:
        resnet, attention = self.up(k, self.blocks)
        behind_attention = f"{resnet.removesuffix('0')}2"
        return behind_attention if self.attends[len(self.attends) - 1 - k] else attention

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.chunk(3)

    def class_embedding(self) -> Tensor:
        return self.take("label_emb.weight")


class _EDM(_Checkpoint):
    """Layout with blocks named by resolution; an attention is part of its block."""

    RESNET: ClassVar = {
        "norm1": "norm0",
        "conv1": "conv0",
        "time_emb_proj": "affine",
        "norm2": "norm1",
        "conv2": "conv1",
        "conv_shortcut": "skip",
    }
    ATTENTION: ClassVar = {"group_norm": "norm2", "to_out.0": "proj"}

    def __init__(self, state: dict[str, Tensor], head_channels: int) -> None:
        if all(name.startswith("model.") for name in state):
            state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
        super().__init__(state, head_channels)
        if any("_aux_" in name for name in state):
            raise UserError(
                "a DDPM++ or NCSN++ network (SongUNet), which has no exact counterpart in UNet2DModel"
            )
        sizes = {int(m[1]) for name in state if (m := re.match(r"enc\.(\d+)x\1_", name))}
        if not sizes:
            raise UserError("enc.* is missing; not a checkpoint of this kind")
        self.image_size = max(sizes)
        self.levels = [f"{size}x{size}" for size in sorted(sizes, reverse=True)]
        self.blocks = sum(bool(re.match(rf"enc\.{self.levels[0]}_block\d+\.conv0\.weight", n)) for n in state)
        self.channels = [self.shape(f"enc.{level}_block0.conv1.weight")[0] for level in self.levels]
        self.attends = [f"enc.{level}_block0.qkv.weight" in state for level in self.levels]
        self.classes = self.shape("map_label.weight")[1] if "map_label.weight" in state else None
        self.scale_shift = True
        widths = {len(t) for name, t in state.items() if re.search(r"norm\d?\.weight$", name)}
        groups = {min(32, width // 4) for width in widths}
        if len(groups) != 1:
            raise UserError(
                f"norms of {sorted(groups)} groups; a UNet2DModel has one number (128 channels or more)"
            )
        self.groups = groups.pop()
        self.others = {
            "time_embedding.linear_1": "map_layer0",
            "time_embedding.linear_2": "map_layer1",
            "conv_in": f"enc.{self.levels[0]}_conv",
            "conv_norm_out": "out_norm",
            "conv_out": "out_conv",
        }
        for name in [name for name in state if name.endswith(".resample_filter")]:
            weights = self.take(name)
            if weights.shape != (1, 1, 2, 2) or not (weights == 0.25).all():
                raise UserError(f"{name}: expected the mean of 2 x 2 pixels, got other weights")
        self.left.pop("map_augment.weight", None)

    def down(self, level: int, i: int) -> tuple[str, str]:
        name = f"enc.{self.levels[level]}_block{i}"
        return name, name

    def downsampler(self, level: int) -> str:
        return f"enc.{self.levels[level + 1]}_down"

    def middle(self) -> tuple[str, str, str]:
        name = f"dec.{self.levels[-1]}_in"
        return f"{name}0", f"{name}0", f"{name}1"

    def up(self, k: int, i: int) -> tuple[str, str]:
        name = f"dec.{self.levels[-1 - k]}_block{i}"
        return name, name

    def upsampler(self, k: int) -> str:
        return f"dec.{self.levels[-2 - k]}_up"

    def split(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(0, (-1, 3)).unbind(1)  # query, key and value are interleaved by channel

    def class_embedding(self) -> Tensor:
        return self.take("map_label.weight").T  # applied to one-hot rows


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
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
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{path}: expected a state dict, of names and tensors alone")
    return state
