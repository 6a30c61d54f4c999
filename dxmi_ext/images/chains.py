"""Other samplers for a run's network, by name: long chains and solvers. Imports the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.images.model import PREDICTIONS, Sampler, are_linear, prediction_of
from dxmi_ext.images.networks.pretrained import DDPM, EDM
from dxmi_ext.images.networks.unet import UNet
from dxmi_ext.images.settings import Config
from dxmi_ext.method import schedules
from dxmi_ext.method.sampler import Clipped, GaussianSampler, Timed
from dxmi_ext.method.schedules import Schedule
from dxmi_ext.method.solvers import SOLVERS, SolverSampler, karras_sigmas, time_in_table

_CLIPPED = "-clipped"


def named(text: str, sampler: GaussianSampler, cfg: Config, diffusion: DDPM | EDM) -> Sampler:
    """The sampler with a name, such as ddim-100 or heun-18, for the pretrained network."""
    unet = sampler.network.network
    assert isinstance(unet, UNet)
    clipped = text.endswith(_CLIPPED)
    name, _, length = text.removesuffix(_CLIPPED).rpartition("-")
    if isinstance(diffusion, EDM):
        kinds, longest = ["edm", "edm-ancestral"], 1000
    else:
        kinds, longest = ["ddim", "ddpm"], len(diffusion.betas)
        if are_linear(diffusion.betas):
            kinds.append("fastdpm")
    kinds += SOLVERS
    if name not in kinds or not length.isdecimal() or not 1 < int(length) <= longest:
        wanted = " or ".join(f"{kind}-STEPS" for kind in kinds)
        raise ConfigError(f"chain must be {wanted} with 2 to {longest} steps, got {text!r}")
    if name in SOLVERS:
        return _solver(name, int(length), unet, cfg, diffusion, sampler.data_shape, clipped)
    chain = _chain(name, int(length), cfg, diffusion)
    network = Timed(unet, chain)
    if clipped:
        network = Clipped(unet, chain, *prediction_of(diffusion))
    return GaussianSampler(network, chain, sampler.data_shape)


def _chain(name: str, steps: int, cfg: Config, diffusion: DDPM | EDM) -> Schedule:
    if isinstance(diffusion, EDM):
        bounds: dict[str, Any] = {
            "sigma_max": cfg.chain.sigma_max,
            "sigma_min": cfg.chain.sigma_min,
            "rho": cfg.chain.rho,
        }
        trained: dict[str, Any] = {"sigma_data": diffusion.sigma_data, "time_scale": diffusion.time_scale}
        return schedules.edm(steps, eta=float(name == "edm-ancestral"), **bounds, **trained)
    prediction = PREDICTIONS[diffusion.prediction]
    if name == "fastdpm":
        return schedules.fastdpm(steps, prediction=prediction)
    own: dict[str, Any] = {"betas": diffusion.betas, "prediction": prediction}
    if name == "ddim":
        return schedules.ddim(steps, **own)
    return schedules.ddim(steps, eta=1.0, large_std=True, **own)


def _solver(
    name: str,
    steps: int,
    network: nn.Module,
    cfg: Config,
    diffusion: DDPM | EDM,
    data_shape: Sequence[int],
    clip: bool,
) -> SolverSampler:
    """A solver on the levels of Karras et al., whatever the diffusion."""
    prediction, sigma_data = prediction_of(diffusion)
    if isinstance(diffusion, EDM):
        scale = diffusion.time_scale
        time, least, largest = (
            (lambda sigma: scale * math.log(sigma) / 4),
            cfg.chain.sigma_min,
            cfg.chain.sigma_max,
        )
    else:
        time, least, largest = time_in_table(diffusion.betas)
    return SolverSampler(
        network,
        SOLVERS[name],
        karras_sigmas(steps, least, largest),
        time=time,
        prediction=prediction,
        sigma_data=sigma_data,
        preserving=isinstance(diffusion, DDPM),
        data_shape=data_shape,
        clip=clip,
    )
