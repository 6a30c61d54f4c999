"""The networks of DxMI on the unit sphere, for positions of feature maps (DxMI, sec. 5.3).

The energy is the reconstruction error of an autoencoder; the sampler starts from data perturbed in the latent
space of the pretrained autoencoder. Imports torch and ``dxmi_ext`` up to ``networks``.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext import ops
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.schedules import Schedule

_SLOPE = 0.2


class SphereAutoencoder(nn.Module):
    """x [N, C] -> its reconstruction [N, C]; latents and reconstructions lie on unit spheres (VGS).

    Args:
        dim: C.
        latent_dim: dimension of latents.
        width, depth: width of the hidden layers, and number of linear layers, of encoder and decoder.
    """

    def __init__(self, dim: int, latent_dim: int = 128, width: int = 1024, depth: int = 3) -> None:
        super().__init__()
        self.encoder = _mlp(dim, latent_dim, width, depth)
        self.decoder = _mlp(latent_dim, dim, width, depth)

    def encode(self, x: Tensor) -> Tensor:
        """Latents, unit vectors [N, latent_dim]."""
        return F.normalize(self.encoder(_unit_variance(x)), dim=1)

    def decode(self, latent: Tensor) -> Tensor:
        """Unit vectors [N, C]."""
        return F.normalize(self.decoder(_unit_variance(latent)), dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


class AutoencoderEnergy(nn.Module):
    """E(x) = scale^2 |x - reconstruction|^2 / .1, with a scale trained from 1 (VGS): x [N, C] -> [N].

    Args:
        autoencoder: network pretrained by `reconstruction.ReconstructionPretrainer`; it is trained further.
        project: whether x is projected onto the sphere first. Otherwise the noise of the sampler's last step
            moves samples off the sphere and distinguishes them from data by their length.
    """

    temperature = 0.1

    def __init__(self, autoencoder: SphereAutoencoder, *, project: bool = True) -> None:
        super().__init__()
        self.autoencoder, self.project = autoencoder, project
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        x = F.normalize(x, dim=1) if self.project else x
        error = (x - self.autoencoder(x)).square().sum(1)
        return self.scale.square() * error / self.temperature


class SphereValue(nn.Module):
    """V^t: (x [N, C], timestep int64 [N], 0..T - 1) -> [N]; separate from the energy.

    Args:
        dim: C.
        steps: T.
        width, depth: width of the hidden layers, and number of linear layers.
        time_dim: dimension of the sinusoidal embedding of t.
    """

    def __init__(
        self, dim: int, steps: int, width: int = 1024, depth: int = 3, *, time_dim: int = 128
    ) -> None:
        super().__init__()
        self.time = _SinusoidalTime(steps, time_dim)
        self.layers = _mlp(dim + time_dim, 1, width, depth)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.layers(torch.cat((_unit_variance(x), self.time(timestep)), dim=1))[:, 0]


class SphereSampler(nn.Module):
    """The mean of x_{t+1}, on the sphere: (x [N, C], timestep int64 [N]) -> unit vectors [N, C].

    Args:
        dim: C.
        steps: T.
        width, depth: width of the hidden layers, and number of linear layers.
        time_dim: dimension of the sinusoidal embedding of t.
        residual: whether x + network(x, t) is projected, with a network that is initially zero, so that an
            untrained sampler only adds noise; otherwise network(x, t) is projected.
        scaled_steps: whether it is x + network(x, t) / sqrt(C) that is projected, with residual.
    """

    def __init__(
        self,
        dim: int,
        steps: int,
        width: int = 2048,
        depth: int = 3,
        *,
        time_dim: int = 128,
        residual: bool = True,
        scaled_steps: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.step_size = 1 / math.sqrt(dim) if scaled_steps else 1.0
        self.time = _SinusoidalTime(steps, time_dim)
        self.layers = _mlp(dim + time_dim, dim, width, depth)
        if residual:
            last = self.layers[-1]
            assert isinstance(last, nn.Linear)
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        mean = self.layers(torch.cat((_unit_variance(x), self.time(timestep)), dim=1))
        return F.normalize(x + self.step_size * mean if self.residual else mean, dim=1)


class LatentStart(nn.Module):
    """x_0 from data: encode, perturb, decode (DxMI, sec. 5.3), in a frozen copy of the autoencoder.

    As the ``start`` of a `GaussianSampler`: (data [N, C], key, sample_offset) -> x_0 [N, C].

    Args:
        autoencoder: network to copy; load its weights into ``autoencoder`` again after pretraining.
        std: standard deviation of the noise in each dimension of a latent; latents have length 1 and are
            normalized again.
    """

    def __init__(self, autoencoder: SphereAutoencoder, std: float) -> None:
        super().__init__()
        if not 0 <= std < math.inf:
            raise ValueError(f"std must be >= 0 and finite, got {std}")
        self.autoencoder = copy.deepcopy(autoencoder).requires_grad_(False)
        self.std = std

    @torch.no_grad()
    def forward(self, data: Tensor, key: Tensor, *, sample_offset: int = 0) -> Tensor:
        latent = self.autoencoder.encode(data)
        z = ops.normal(latent.shape, key, sample_offset=sample_offset, dtype=latent.dtype)
        return self.autoencoder.decode(F.normalize(latent + self.std * z, dim=1))


def schedule(steps: int, *, std: float = 0.05, last_std: float = 0.01) -> Schedule:
    """x_{t+1} = network(x_t, t) + sigma_t z: a = 0, b = 1 (DxMI, sec. 5.3); sigma_t falls geometrically.

    Args:
        steps: T.
        std, last_std: initial sigma of the first and the last step, in each of the C dimensions. The noise
            has a length of about sigma sqrt(C), and points on the sphere have length 1.
    """
    if steps < 1 or not 0 < last_std <= std < math.inf:
        raise ValueError(
            f"steps must be >= 1 and 0 < last_std <= std, got steps={steps}, std={std}, last_std={last_std}"
        )
    ones = torch.ones(steps, dtype=torch.float64)
    return Schedule(
        sample_coef=0 * ones,
        output_coef=ones,
        log_std=torch.linspace(math.log(std), math.log(last_std), steps, dtype=torch.float64),
        signal=ones,  # the input is data; there is no denoising pretraining
        noise=0 * ones,
        initial_std=1.0,
        time=torch.arange(steps, dtype=torch.float64),
        input_scale=ones,
    )


def build(
    dim: int,
    *,
    steps: int = 5,
    latent_dim: int = 128,
    energy_width: int = 1024,
    value_width: int = 1024,
    sampler_width: int = 2048,
    depth: int = 3,
    time_dim: int = 128,
    latent_std: float = 0.05,
    std: float = 0.05,
    last_std: float = 0.01,
    max_std: float | None = None,
    residual: bool = True,
    scaled_steps: bool = False,
    project: bool = True,
) -> Networks:
    """All networks for C = dim, by default with the paper's widths. Pretrain
    ``networks.energy_network.autoencoder``, then copy it to ``networks.sampler.start``.

    Args:
        std, last_std: see `schedule`.
        max_std: upper bound of sigma in training, since the energy sees only directions, while the entropy
            would grow without bound with the length of the noise. None: 1 / sqrt(C), where the noise is as
            long as the data, or ``std`` if larger.
        others: see the classes above.
    """
    autoencoder = SphereAutoencoder(dim, latent_dim, energy_width, depth)
    network = SphereSampler(
        dim, steps, sampler_width, depth, time_dim=time_dim, residual=residual, scaled_steps=scaled_steps
    )
    sampler = GaussianSampler(
        network,
        schedule(steps, std=std, last_std=last_std),
        (dim,),
        start=LatentStart(autoencoder, latent_std),
        max_std=max(std, 1 / math.sqrt(dim)) if max_std is None else max_std,
    )
    value = SphereValue(dim, steps, value_width, depth, time_dim=time_dim)
    return Networks(sampler, value, AutoencoderEnergy(autoencoder, project=project))


class _SinusoidalTime(nn.Module):
    """timestep int64 [N] -> [N, size] (Vaswani et al. 2017), with t = 0..T scaled to 0..1000, for which
    the frequencies are designed."""

    def __init__(self, steps: int, size: int) -> None:
        super().__init__()
        if size < 2 or size % 2:
            raise ValueError(f"time_dim must be even and >= 2, got {size}")
        frequency = torch.exp(-math.log(10_000) * torch.arange(size // 2) / (size // 2))
        self.angle: Tensor
        self.register_buffer("angle", 1000 / steps * frequency, persistent=False)

    def forward(self, timestep: Tensor) -> Tensor:
        angle = timestep[:, None] * self.angle
        return torch.cat((angle.sin(), angle.cos()), dim=1)


def _unit_variance(x: Tensor) -> Tensor:
    """Scales coordinates of unit vectors to unit variance, for which layers are initialized."""
    return x * math.sqrt(x.shape[1])


def _mlp(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, *[width] * (depth - 1)):
        layers += [nn.Linear(size, width), nn.LeakyReLU(_SLOPE)]
        nn.init.kaiming_normal_(layers[-2].weight, a=_SLOPE, nonlinearity="leaky_relu")  # type: ignore[arg-type]
    layers.append(nn.Linear(width, outputs))
    for layer in layers[::2]:
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)
