"""DxMI's training iteration (DxMI, Alg. 1). Imports torch, ``dxmi_ext.ops`` and what lies between.

The energy is V^T, the last step of a time-dependent value network, so one network serves both.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext import noise, ops
from dxmi_ext.config import Settings, setting
from dxmi_ext.sampler import GaussianSampler, Trajectory


class Stepper(Protocol):
    """What a run repeats: an iteration over a batch, with a state that resumes exactly."""

    iteration: int

    def step(self, data: Tensor) -> dict[str, Tensor]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class DxMISettings(Settings):
    """Settings of the algorithm, in the paper's symbols."""

    tau: float = setting(0.1, "temperature of entropy and running cost", minimum=0)
    gamma: float = setting(1.0, "weight of the squared energies in the energy loss", minimum=0)
    cost_reduction: str = setting(
        "mean", "of costs over data dimensions; sum multiplies tau by D", choices=("mean", "sum")
    )
    velocity_decay: float = setting(0.99, "alpha of adaptive velocity regularisation", minimum=0)
    sampler_steps: int = setting(2, "sampler steps an iteration; T of them use the whole path", minimum=1)
    sampler_lr: float = setting(5e-4, "learning rate of the sampler's network", minimum=0)
    log_std_lr: float = setting(1.5e-3, "learning rate of log sigma", minimum=0)
    value_lr: float = setting(1e-3, "learning rate of the value, and so of the energy", minimum=0)
    lr_decay: str = setting("linear", "learning rates over the run", choices=("constant", "linear", "cosine"))
    sampler_clip: float = setting(0.1, "largest gradient norm of the sampler; 0: any", minimum=0)
    value_clip: float = setting(0.0, "largest gradient norm of the value; 0: any", minimum=0)
    ema_decay: float = setting(0.995, "decay of the averaged networks, used for evaluation", minimum=0)


class Networks(nn.Module):
    """What DxMI trains together, averages, checkpoints and exports.

    Args:
        sampler: pi.
        value: V, (x [N, *], timestep int64 [N], 0..T) -> [N]; V^T is the energy.
    """

    def __init__(self, sampler: GaussianSampler, value: nn.Module) -> None:
        super().__init__()
        self.sampler, self.value = sampler, value

    def energy(self, x: Tensor) -> Tensor:
        """E(x) = V^T(x), [N]; low where data is likely."""
        return self.value(x, torch.full((len(x),), self.sampler.steps, device=x.device))


class DxMITrainer:
    """Trains a sampler and a value together.

    Args:
        networks: both of them.
        settings: of the algorithm.
        iterations: length of the run, over which learning rates decay.
        seed: of every random choice; each is keyed by the row, so none depends on the batch's split.
    """

    def __init__(
        self,
        networks: Networks,
        settings: DxMISettings,
        *,
        iterations: int,
        seed: int,
    ) -> None:
        self.networks, self.settings = networks, settings
        self.sampler, self.value = sampler, value = networks.sampler, networks.value
        self.iterations, self.iteration = iterations, 0
        log_std = sampler.log_std.detach()
        self.velocity_var = (2 * log_std).exp()  # s_t^2 starts at sigma_t^2
        self.time_cost = torch.zeros_like(log_std)  # Alg. 2's; none in Alg. 1
        dim = math.prod(sampler.data_shape) if settings.cost_reduction == "sum" else 1
        self.tau = settings.tau * dim
        self.sampler_optimizer = torch.optim.Adam(
            [
                {"params": list(sampler.network.parameters()), "lr": settings.sampler_lr},
                {"params": [sampler.log_std], "lr": settings.log_std_lr},
            ],
            fused=True,
        )
        self.value_optimizer = torch.optim.Adam(value.parameters(), lr=settings.value_lr, fused=True)
        self._learning_rates = LearningRates(
            [self.sampler_optimizer, self.value_optimizer], settings.lr_decay, iterations
        )
        # An exponential moving average, for evaluation. torch's AveragedModel would wait for the device.
        self.averaged = copy.deepcopy(networks).requires_grad_(False)
        self._average = get_ema_multi_avg_fn(settings.ema_decay)
        redraws = [f"redraw{i}" for i in range(settings.sampler_steps)]
        self._draws = noise.Draws(seed, "dxmi", ["rollout", "choice", *redraws], log_std.device)

    def step(self, data: Tensor) -> dict[str, Tensor]:
        """One iteration of Algorithm 1.

        Args:
            data: [B, *], a minibatch.

        Returns:
            What to log, on the device and not yet reduced.
        """
        self._learning_rates.at(self.iteration)
        keys = self._draws.at(self.iteration)
        path = self.sampler.rollout(len(data), keys["rollout"])
        metrics = self._energy_step(data, path.samples[-1])
        metrics["value_loss"] = self._value_steps(path)
        metrics["sampler_loss"] = self._sampler_steps(path, keys)
        ops.update_velocity_var_(self.velocity_var, path.sq_displacement, self.settings.velocity_decay)
        self._average([*self.averaged.parameters()], [*self.networks.parameters()], None)
        self.iteration += 1
        return metrics | {"std": self.sampler.log_std.detach().exp(), "velocity_var": self.velocity_var}

    def _energy_step(self, data: Tensor, samples: Tensor) -> dict[str, Tensor]:
        """Lowers the energy of data, raises that of samples."""
        n = len(data)
        energies = self.networks.energy(torch.cat((data, samples)))
        loss = ops.energy_loss(energies[:n], energies[n:], self.settings.gamma)
        descend(loss, self.value_optimizer, self.settings.value_clip)
        energies = energies.detach()
        return {"energy_loss": loss.detach(), "energy_data": energies[:n], "energy_sample": energies[n:]}

    def _value_steps(self, path: Trajectory) -> Tensor:
        """Temporal differences, backward in time: each step learns from the value just updated."""
        steps, n = path.sq_displacement.shape
        losses = []
        for t in reversed(range(steps)):
            timestep = self.sampler.timestep(t, n)
            with torch.no_grad():
                next_value = self.value(path.samples[t + 1], timestep + 1)
            target = ops.td_target(
                next_value,
                path.sq_displacement[t],
                timestep,
                self.sampler.log_std,
                self.velocity_var,
                self.time_cost,
                self.tau,
                self.tau,
            )
            loss = nn.functional.mse_loss(self.value(path.samples[t], timestep), target)
            descend(loss, self.value_optimizer, self.settings.value_clip)
            losses.append(loss.detach())
        return torch.stack(losses)

    def _sampler_steps(self, path: Trajectory, keys: dict[str, Tensor]) -> Tensor:
        """Redraws single steps from random places of the path. No gradient crosses steps."""
        steps, n = path.sq_displacement.shape
        rows = torch.arange(n, device=path.samples.device)
        first = noise.randint(steps, n, keys["choice"])  # where each particle's steps start
        losses = []
        with frozen(self.value):
            for i in range(self.settings.sampler_steps):
                timestep = (first + i) % steps
                sample = path.samples[timestep, rows]
                redrawn = self.sampler(sample, timestep, keys[f"redraw{i}"])
                cost = ops.running_cost(
                    redrawn.sq_displacement,
                    timestep,
                    self.sampler.log_std,
                    self.velocity_var,
                    self.tau,
                    self.tau,
                )
                loss = (self.value(redrawn.next_sample, timestep + 1) + cost).mean()
                descend(loss, self.sampler_optimizer, self.settings.sampler_clip)
                losses.append(loss.detach())
        return torch.stack(losses)

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs; noise keys follow from the iteration."""
        return {
            "iteration": self.iteration,
            "networks": self.networks.state_dict(),
            "averaged": self.averaged.state_dict(),
            "sampler_optimizer": self.sampler_optimizer.state_dict(),
            "value_optimizer": self.value_optimizer.state_dict(),
            "velocity_var": self.velocity_var,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.networks.load_state_dict(state["networks"])
        self.averaged.load_state_dict(state["averaged"])
        self.sampler_optimizer.load_state_dict(state["sampler_optimizer"])
        self.value_optimizer.load_state_dict(state["value_optimizer"])
        self.velocity_var.copy_(state["velocity_var"])


class LearningRates:
    """Scales the optimizers' rates over a run; a function of the iteration, so it has no state.

    Args:
        optimizers: with the rates to start from.
        decay: constant, linear (to 0) or cosine (to 0).
        iterations: length of the run.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer], decay: str, iterations: int) -> None:
        self._optimizers, self._decay, self._iterations = optimizers, decay, iterations
        self._initial = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def at(self, iteration: int) -> None:
        done = iteration / self._iterations
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        for optimizer, rates in zip(self._optimizers, self._initial, strict=True):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * factor[self._decay]


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, clip: float = 0.0) -> None:
    """One optimizer step on a loss, its gradient norm clipped to ``clip`` unless that is 0."""
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_((p for g in optimizer.param_groups for p in g["params"]), clip)
    optimizer.step()


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Gradients pass through the module to its input; its weights get none, and none is computed."""
    weights = [p for p in module.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
