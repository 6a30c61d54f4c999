"""Denoising pretraining of a sampler's network, by DDPM's or EDM's objective. Imports the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.arguments import of_type
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.engine.compute.execution import ExecutionSettings, prepare
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Average, Learner
from dxmi_ext.engine.settings import ConfigError, Settings, setting
from dxmi_ext.method import schedules, trial
from dxmi_ext.method.noise import randint
from dxmi_ext.method.sampler import per_row
from dxmi_ext.method.schedules.tables import PREDICTIONS
from dxmi_ext.method.stepper import Batch, Metrics, Stepper


class Levels(NamedTuple):
    """Noise levels of N rows: row i is signal[i] data[i] + noise[i] eps[i]."""

    signal: Tensor
    """[N], like the other fields."""
    noise: Tensor
    """[N]"""
    time: Tensor
    """The network's time input."""
    input_scale: Tensor | None = None
    """Factor of the network's input; None: 1."""


DrawLevels = Callable[[int, Tensor, int], Levels]
"""(N, noise key, global index of the first row) -> levels to train at."""


def uniform_levels(signal: Tensor, noise: Tensor) -> DrawLevels:
    """Levels drawn uniformly from a table, of the sampler's own steps or DDPM's; the time is the index.

    Args:
        signal, noise: [L].

    Raises:
        TypeError: one is not a tensor.
        ValueError: their lengths differ.
    """
    for name, table in (("signal", signal), ("noise", noise)):
        of_type(name, table, Tensor, "a tensor")
    if signal.ndim != 1 or signal.shape != noise.shape or not len(signal):
        got = f"{[*signal.shape]}, {[*noise.shape]}"
        raise ValueError(f"signal, noise must have the same shape [L], L >= 1, got {got}")
    signal, noise = signal.float(), noise.float()

    def draw(n: int, key: Tensor, sample_offset: int) -> Levels:
        place = randint(len(signal), n, key, sample_offset=sample_offset)
        return Levels(signal.to(key.device)[place], noise.to(key.device)[place], place)

    return draw


def lognormal_levels(
    *, mean: float = -1.2, std: float = 1.2, sigma_data: float = 0.5, time_scale: float = 1.0
) -> DrawLevels:
    """data + sigma eps, ln sigma ~ N(mean, std^2), with the loss's weight of Karras et al. 2022, Table 1.

    Args:
        mean, std: of ln sigma.
        sigma_data: standard deviation of the data.
        time_scale: factor of the time ln(sigma) / 4 that the network gets.
    """

    def draw(n: int, key: Tensor, sample_offset: int) -> Levels:
        log_sigma = mean + std * ops.normal((n, 1), key, sample_offset=sample_offset)[:, 0]
        sigma = log_sigma.exp()
        scale = (sigma**2 + sigma_data**2).rsqrt()
        return Levels(torch.ones_like(sigma), sigma, time_scale / 4 * log_sigma, scale)

    return draw


@dataclasses.dataclass
class PretrainerSettings(Settings):
    """The arguments of a `Pretrainer` that have to be the same when a run of `fit` resumes."""

    heading = "pretraining"
    prediction: str = setting("eps", "what the network predicts", choices=PREDICTIONS)
    sigma_data: float = setting(0.5, "standard deviation of the data, for edm")
    lr: float = setting(0.0, "learning rate, decayed to 0", minimum=0)
    warmup: float = setting(0, "iterations in which the learning rate rises from 0", minimum=0)
    ema_decay: float = setting(0.0, "decay of the averaged weights; 0: none", minimum=0, below=1)
    clip: float = setting(0.0, "maximum gradient norm; 0: no clipping", minimum=0)


class Pretrainer(Stepper):
    """Trains a network by denoising: least squares on noisy data.

    Args:
        network: (x [N, *], time [N]) -> [N, *], with labels [N] if the data have them.
        draw_levels: draws the noise levels to train at.
        prediction: what the network predicts; see `schedules.from_levels`.
        sigma_data: standard deviation of the data, for the prediction "edm".
        lr: learning rate, decayed to 0 over the run.
        warmup: number of first iterations in which the learning rate rises from 0.
        iterations: length of the run.
        seed: seed of every random choice; each is keyed by the global row.
        ema_decay: decay of `averaged`; 0: no averaging.
        clip: maximum gradient norm; 0: no clipping.
        ranks: ranks that share the rows of a batch.
        execution: precision, memory format and compilation of the network.
        memory_format: memory format of the data; None: that of ``execution``.

    Attributes:
        averaged: the network with averaged weights.

    Raises:
        TypeError: ``network`` or ``draw_levels`` is of another type.
        ConfigError: the network has no weights to train, or another argument is invalid.
    """

    stream = "pretrain"

    def __init__(
        self,
        network: nn.Module,
        draw_levels: DrawLevels,
        *,
        prediction: str = "eps",
        sigma_data: float = 0.5,
        lr: float,
        warmup: int = 0,
        iterations: int,
        seed: int,
        ema_decay: float = 0.0,
        clip: float = 0.0,
        ranks: Ranks | None = None,
        execution: ExecutionSettings | None = None,
        memory_format: torch.memory_format | None = None,
    ) -> None:
        of_type("network", network, nn.Module, "a torch.nn.Module")
        if not callable(draw_levels):
            got = type(draw_levels).__name__
            raise TypeError(f"draw_levels must be a function, such as uniform_levels(...), got {got}")
        if not any(p.requires_grad for p in network.parameters()):
            kind = type(network).__name__
            raise ConfigError(f"network must have weights to train, got {kind} without any that require grad")
        self.settings = PretrainerSettings(prediction, sigma_data, lr, warmup, ema_decay, clip)
        if sigma_data <= 0:
            raise ConfigError(f"sigma_data must be > 0, got {sigma_data!r}")
        self._draw_levels = draw_levels
        self.network, self.iterations = network, iterations
        ranks, execution = ranks or Ranks(), execution or ExecutionSettings()
        prepared = prepare(execution, network)
        self.memory_format = prepared if memory_format is None else memory_format
        ranks.equalize_(network)
        ranks.shard_(network)
        self.average = Average(network, ema_decay) if ema_decay else None
        self.averaged = network if self.average is None else self.average.module
        self.learner = Learner(network, lr, "linear", iterations, ranks, clip=clip, warmup=warmup)
        self.learners = [self.learner]
        super().__init__(
            seed=seed,
            device=next(network.parameters()).device,
            ranks=ranks,
            execution=execution,
            uses=("timestep", "noise"),
        )

    def try_networks(self, data: Tensor, labels: Tensor | None) -> None:
        levels = self._levels(data, ops.noise_key(0, device=data.device), 0)
        trial.check("network", self.network, data, levels.time, labels, shape=data.shape)

    def _levels(self, data: Tensor, key: Tensor, offset: int) -> Levels:
        """The levels of a batch, in the dtype of its data."""
        levels = self._draw_levels(len(data), key, offset)
        if not isinstance(levels, Levels):
            raise ConfigError(f"draw_levels must return Levels, got {type(levels).__name__}")
        given = {name: x for name, x in levels._asdict().items() if x is not None and x.is_floating_point()}
        return levels._replace(**{name: x.to(data.dtype) for name, x in given.items()})

    def iterate(self, batch: Batch) -> Metrics:
        data, levels = batch.data, self._levels(batch.data, batch.keys["timestep"], batch.offset)
        eps = ops.normal(data.shape, batch.keys["noise"], sample_offset=batch.offset, dtype=data.dtype)
        eps = eps.contiguous(memory_format=self.memory_format)
        signal, noise = per_row(levels.signal, data), per_row(levels.noise, data)
        noisy = signal * data + noise * eps
        prediction, sigma_data = self.settings.prediction, self.settings.sigma_data
        target = schedules.target(prediction, data, eps, signal, noise, sigma_data)
        if levels.input_scale is not None:
            noisy = per_row(levels.input_scale, data) * noisy
        output = call(self.learner.network, noisy, levels.time, batch.labels)
        loss = self.learner.descend("network", nn.functional.mse_loss(output, target))
        if self.average is not None:
            self.average.update()
        return self.ranks.mean({"loss": loss})

    def parts(self) -> dict[str, Any]:
        averaged = {} if self.average is None else {"averaged": self.averaged}
        return {
            "network": self.network,
            "optimizer": self.learner.optimizer,
            "failures": self.learner.failures["network"],
            **averaged,
        }
