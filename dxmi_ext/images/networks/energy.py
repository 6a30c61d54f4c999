"""Energies and values of images: residual convolutional networks. Imports torch and ``images.networks.unet``.

As in DxMI: width 128, 6 residual blocks, 3 of them downsampling, width 256 from the third, no normalization,
leaky ReLU .2, pooling, a learned affine map of the output; 5.1M parameters. Unspecified details follow
Du & Mordatch 2019, whose network has the same count. A 3 x 3 convolution with an activation comes first. A
block has two 3 x 3 convolutions with an activation between, a skip connection, then an activation. Blocks 1,
3 and 5 downsample, by 2 x 2 means before the last activation, with a 1 x 1 convolution without bias on the
skip. The mean over pixels passes a linear map without bias and the affine map. The paper's sum gives the same
functions, but scales an optimizer's step by the number of pixels. Each block's second convolution is
initialized to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.images.networks.unet import check_labels

_SLOPE = 0.2
_DOWN = (True, False, True, False, True, False)
_WIDER = (1, 1, 2, 2, 2, 2)  # multiples of the width


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv1 = _convolution(inputs, outputs)
        self.conv2 = _convolution(outputs, outputs)
        nn.init.zeros_(self.conv2.weight)
        self.skip = nn.Conv2d(inputs, outputs, 1, bias=False) if down or inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, modulation: Tensor | None) -> Tensor:
        h = self.conv1(x)
        if modulation is not None:
            scale, shift = modulation[:, :, None, None].chunk(2, dim=1)
            h = h * (1 + scale) + shift
        h = self.conv2(F.leaky_relu(h, _SLOPE)) + self.skip(x)
        if self.down:
            h = F.avg_pool2d(h, 2, ceil_mode=True)  # keep the last row and column of odd sizes
        return F.leaky_relu(h, _SLOPE)


class _Network(nn.Module):
    """The residual network; conditions, int64 [N] each, scale and shift the hidden features of each block."""

    def __init__(self, channels: int, width: int, conditions: list[int]) -> None:
        super().__init__()
        widths = [width, *(width * factor for factor in _WIDER)]
        self.first = _convolution(channels, width)
        self.blocks = nn.ModuleList(
            _Block(inputs, outputs, down)
            for inputs, outputs, down in zip(widths[:-1], widths[1:], _DOWN, strict=True)
        )
        self.modulations = nn.ModuleList(
            nn.ModuleList(_zero_embedding(count, 2 * outputs) for outputs in widths[1:])
            for count in conditions
        )
        self.last = nn.Linear(widths[-1], 1, bias=False)
        self.scale = nn.Parameter(torch.ones(()))
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, *conditions: Tensor) -> Tensor:
        h = F.leaky_relu(self.first(x), _SLOPE)
        for i, block in enumerate(self.blocks):
            modulation = None
            for tables, condition in zip(self.modulations, conditions, strict=True):
                row = tables[i](condition)  # type: ignore[index]
                modulation = row if modulation is None else modulation + row
            h = block(h, modulation)
        return self.scale * self.last(h.mean(dim=(2, 3)))[:, 0] + self.shift


class ResNetEnergy(nn.Module):
    """E: (x [N, C, H, W], labels int64 [N] if conditional) -> [N], for any H and W.

    `networks.TimeIndependent` makes it a value (DxMI, Alg. 2).

    Args:
        channels: number of channels C.
        width: width of the first blocks, 128 in the paper.
        classes: number of classes; None: unconditional.
    """

    def __init__(self, channels: int, width: int = 128, classes: int | None = None) -> None:
        super().__init__()
        self.network = _Network(channels, width, [] if classes is None else [classes])
        self.classes = classes

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x, *_given(labels, self.classes))


class ResNetValue(nn.Module):
    """V^t: (x [N, C, H, W], timestep int64 [N], labels int64 [N] if conditional) -> [N].

    Args:
        channels: number of channels C.
        steps: T; t = 0..T, where V^T is the energy.
        width, classes: see `ResNetEnergy`.
    """

    def __init__(self, channels: int, steps: int, width: int = 128, classes: int | None = None) -> None:
        super().__init__()
        self.network = _Network(channels, width, [steps + 1] if classes is None else [steps + 1, classes])
        self.classes = classes

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.network(x, timestep, *_given(labels, self.classes))


def _given(labels: Tensor | None, classes: int | None) -> tuple[Tensor, ...]:
    check_labels(labels, classes)
    return () if labels is None else (labels,)


def _convolution(inputs: int, outputs: int) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, 3, padding=1)
    nn.init.kaiming_normal_(layer.weight, a=_SLOPE, nonlinearity="leaky_relu")
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


def _zero_embedding(count: int, size: int) -> nn.Embedding:
    table = nn.Embedding(count, size)
    nn.init.zeros_(table.weight)
    return table
