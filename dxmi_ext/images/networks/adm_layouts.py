"""The two layouts of ADM checkpoints: guided-diffusion's, as of consistency models, and EDM's.

Imports torch and ``dxmi_ext``.
"""

from __future__ import annotations

import re
from typing import ClassVar

from torch import Tensor

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.networks.adm import Checkpoint


class Consistency(Checkpoint):
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


class EDM(Checkpoint):
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
