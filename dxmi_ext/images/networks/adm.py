"""ADM networks (Dhariwal & Nichol 2021) of checkpoints, renamed for diffusers.

Imports torch and ``dxmi_ext``; diffusers where used.
"""

from __future__ import annotations

import textwrap
from typing import Any, ClassVar

import torch
from torch import Tensor

from dxmi_ext.engine.errors import UserError, first_few
from dxmi_ext.images.networks.unet import Architecture, UNet, unet_config


class Checkpoint:
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
            raise UserError(f"entries that no layer uses: {first_few(self.left)}")
        new = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in new.items()}
        with torch.device("meta"):
            model: Any = UNet2DModel(**config)
        try:
            model.load_state_dict(new, assign=True)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 300)
            raise UserError(f"does not describe one ADM network: {reason}") from error
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
