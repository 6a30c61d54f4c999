"""Networks of an iteration on images: DDPM's U-Net and a smaller convolutional value. Imports torch alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """DDPM's U-Net (Ho et al., 2020), by default of 35.7 M weights: (x [N, 3, H, H], timestep [N]) -> like x.

    Args:
        steps: T.
        width: channels of the first level; each level has its multiple and half the resolution of the last.
        blocks: number of residual blocks per level.
        attention: index of the level whose blocks have self-attention.
    """

    def __init__(
        self,
        steps: int,
        width: int = 128,
        multiples: Sequence[int] = (1, 2, 2, 2),
        blocks: int = 2,
        attention: int = 1,
    ) -> None:
        super().__init__()
        wide = 4 * width
        self.step = nn.Sequential(nn.Embedding(steps, wide), nn.SiLU(), nn.Linear(wide, wide), nn.SiLU())
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        channels, skips = width, [width]
        for level, multiple in enumerate(multiples):
            for _ in range(blocks):
                self.down.append(_Block(channels, multiple * width, wide, level == attention))
                channels = multiple * width
                skips.append(channels)
            if level + 1 < len(multiples):
                self.down.append(_Resize(channels, 0.5))
                skips.append(channels)
        self.middle = nn.ModuleList(_Block(channels, channels, wide, i == 0) for i in range(2))
        for level, multiple in reversed(list(enumerate(multiples))):
            for _ in range(blocks + 1):
                self.up.append(_Block(channels + skips.pop(), multiple * width, wide, level == attention))
                channels = multiple * width
            if level:
                self.up.append(_Resize(channels, 2))
        self.last = nn.Sequential(_norm(channels), nn.SiLU(), nn.Conv2d(channels, 3, 3, padding=1))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        step = self.step(timestep)
        x = self.first(x)
        skips = [x]
        for module in self.down:
            x = module(x, step)
            skips.append(x)
        for module in self.middle:
            x = module(x, step)
        for module in self.up:
            x = module(x if isinstance(module, _Resize) else torch.cat((x, skips.pop()), 1), step)
        return self.last(x)


class ConvValue(nn.Module):
    """V^t(x): (x [N, 3, H, H], timestep [N]) -> [N], for t = 0..T; one trunk, a linear head each.

    Args:
        steps: T.
        width: channels of the first level; three more follow, each of twice as many and half the resolution.
    """

    def __init__(self, steps: int, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.LeakyReLU(0.2)]
        for _ in range(3):
            layers += [nn.Conv2d(width, 2 * width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            width *= 2
        self.trunk, self.heads = nn.Sequential(*layers), nn.Linear(width, steps + 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.heads(self.trunk(x).mean((2, 3))).gather(1, timestep[:, None])[:, 0]


class BFloat16(nn.Module):
    """A network run in bfloat16 and channels_last; samples and values stay as they are."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.network(x.contiguous(memory_format=torch.channels_last), timestep).to(x.dtype)


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, step: int, attends: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = _norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.step = nn.Linear(step, outputs)
        self.norm2, self.conv2 = _norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attends else nn.Identity()

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.step(step)[:, :, None, None]
        return self.attention(self.skip(x) + self.conv2(F.silu(self.norm2(h))))


class _Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = _norm(channels)
        self.qkv, self.out = nn.Conv2d(channels, 3 * channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)[:, None].chunk(3, -1)
        attended = F.scaled_dot_product_attention(q, k, v)[:, 0].transpose(1, 2)
        return x + self.out(attended.reshape(x.shape))


class _Resize(nn.Module):
    def __init__(self, channels: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.conv = nn.Conv2d(channels, channels, 3, stride=2 if scale < 1 else 1, padding=1)

    def forward(self, x: Tensor, step: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=self.scale) if self.scale > 1 else x)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(min(32, channels // 4), channels)
