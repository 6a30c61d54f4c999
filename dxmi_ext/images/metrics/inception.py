"""The Inception-v3 network of the FID (Heusel et al. 2017).

The graph of 2015-12-05 differs from later Inceptions: average pools exclude the padding, the last block has a
max pool, and images are resized as in TensorFlow 1. Imports torch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_SIZE = 299
Conv = tuple[str, int, int | tuple[int, int]]  # name, output channels, kernel
Step = Conv | list[Conv] | str  # one convolution, several side by side, or a pool


class Inception(nn.Module):
    """uint8 images [n, 3, H, W] -> features [n, 2048] of the last pool.

    Its state dict has the names of the weights file ``inception-2015-12-05`` that pytorch-fid and
    torch-fidelity share.
    """

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, stride=2, padding=0)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, padding=0)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, padding=0)
        self.Mixed_5b = _block_a(192, pool=32)
        self.Mixed_5c = _block_a(256, pool=64)
        self.Mixed_5d = _block_a(288, pool=64)
        self.Mixed_6a = _block_b(288)
        self.Mixed_6b = _block_c(768, 128)
        self.Mixed_6c = _block_c(768, 160)
        self.Mixed_6d = _block_c(768, 160)
        self.Mixed_6e = _block_c(768, 192)
        self.Mixed_7a = _block_d(768)
        self.Mixed_7b = _block_e(1280, "mean")
        self.Mixed_7c = _block_e(2048, "max")
        self.fc = nn.Linear(2048, 1008)  # unused; in the weights file

    def forward(self, images: Tensor) -> Tensor:
        x = (resize(images.to(self.fc.weight.dtype), _SIZE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))


def resize(images: Tensor, size: int) -> Tensor:
    """Bilinear as in TensorFlow 1: output pixel i is at i * input / output, without half pixels or filter."""

    def weights(n: int) -> Tensor:  # positions in float32, as in TensorFlow
        place = torch.arange(size, dtype=torch.float32, device=images.device) * (n / size)
        low = place.long()
        eye = torch.eye(n, dtype=images.dtype, device=images.device)
        return torch.lerp(eye[low], eye[(low + 1).clamp(max=n - 1)], (place - low).to(eye).unsqueeze(1))

    height, width = images.shape[-2:]
    return weights(height) @ images @ weights(width).T


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(
        self,
        channels: int,
        out: int,
        kernel: int | tuple[int, int],
        *,
        stride: int = 1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (kernel[0] // 2, kernel[1] // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(channels, out, kernel, stride, pad, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Block(nn.Module):
    """Parallel branches, each a chain of steps; with ``strides``, a chain's last convolution has stride 2."""

    def __init__(self, channels: int, branches: list[list[Step]], *, strides: bool = False) -> None:
        super().__init__()
        self.branches = branches
        for branch in branches:
            width = channels
            for step in branch:
                if isinstance(step, str):
                    continue
                options = {"stride": 2, "padding": 0} if strides and step is branch[-1] else {}
                parallel = step if isinstance(step, list) else [step]
                for name, out, kernel in parallel:
                    self.add_module(name, _Conv(width, out, kernel, **options))
                width = sum(out for _, out, _ in parallel)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._chain(x, branch) for branch in self.branches], dim=1)

    def _chain(self, x: Tensor, branch: list[Step]) -> Tensor:
        for step in branch:
            if isinstance(step, str):
                x = _POOLS[step](x)
            elif isinstance(step, list):
                x = torch.cat([self.get_submodule(name)(x) for name, _, _ in step], dim=1)
            else:
                x = self.get_submodule(step[0])(x)
        return x


_POOLS = {
    "mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "max": lambda x: F.max_pool2d(x, 3, 1, 1),
    "stride": lambda x: F.max_pool2d(x, 3, 2),
}


def _chain(name: str, *convolutions: tuple[int, int | tuple[int, int]]) -> list[Step]:
    return [(f"{name}_{i}", out, kernel) for i, (out, kernel) in enumerate(convolutions, 1)]


def _block_a(channels: int, pool: int) -> _Block:
    return _Block(
        channels,
        [
            [("branch1x1", 64, 1)],
            _chain("branch5x5", (48, 1), (64, 5)),
            _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3)),
            ["mean", ("branch_pool", pool, 1)],
        ],
    )


def _block_b(channels: int) -> _Block:
    chain = _chain("branch3x3dbl", (64, 1), (96, 3), (96, 3))
    return _Block(channels, [[("branch3x3", 384, 3)], chain, ["stride"]], strides=True)


def _block_c(channels: int, width: int) -> _Block:
    row, column = (1, 7), (7, 1)
    return _Block(
        channels,
        [
            [("branch1x1", 192, 1)],
            _chain("branch7x7", (width, 1), (width, row), (192, column)),
            _chain("branch7x7dbl", (width, 1), (width, column), (width, row), (width, column), (192, row)),
            ["mean", ("branch_pool", 192, 1)],
        ],
    )


def _block_d(channels: int) -> _Block:
    return _Block(
        channels,
        [
            _chain("branch3x3", (192, 1), (320, 3)),
            _chain("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3)),
            ["stride"],
        ],
        strides=True,
    )


def _block_e(channels: int, pool: str) -> _Block:
    def split(name: str) -> list[Conv]:
        return [(f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))]

    return _Block(
        channels,
        [
            [("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), split("branch3x3_2")],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3), split("branch3x3dbl_3")],
            [pool, ("branch_pool", 192, 1)],
        ],
    )
