"""DxMI's iteration (DxMI, Alg. 1) as a plain torch loop, as such loops are usually written: pointwise torch
ops, torch's noise, default optimizers, a growing list for the trajectory, and numbers to log every time.

Imports torch, and from ``dxmi_ext`` only the networks' container and settings; it calls none of its ops.
"""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from torch import Tensor, nn

from dxmi_ext.method.networks import Networks
from dxmi_ext.method.settings import DxMISettings


class TorchNoise:
    """Noise as loops usually draw it."""

    def start(self, iteration: int) -> None:
        """Begins a new iteration."""

    def normal(self, use: str, like: Tensor, timestep: Tensor | None) -> Tensor:
        """z for a use within the iteration; no timestep: for x_0."""
        return torch.randn_like(like)

    def choice(self, steps: int, like: Tensor) -> Tensor:
        """A step for each row."""
        return torch.randint(steps, (len(like),), device=like.device)


class PlainLoop:
    """Trains a sampler and a value together; the same losses as `dxmi_ext.method.trainer.DxMITrainer`.

    Args:
        fused: fused optimizers, as the trainer's, rather than torch's default.
    """

    def __init__(
        self,
        networks: Networks,
        settings: DxMISettings,
        *,
        iterations: int,
        noise: TorchNoise | None = None,
        fused: bool = False,
    ) -> None:
        self.settings, self.noise = settings, noise or TorchNoise()
        self.networks, self.average = networks, deepcopy(networks)
        self.network, self.value = networks.sampler.network, networks.value
        self.a, self.b = networks.sampler.sample_coef, networks.sampler.output_coef
        self.log_std = networks.sampler.log_std
        self.steps, self.initial_std = networks.sampler.steps, networks.sampler.initial_std
        self.tau = settings.tau
        if settings.cost_reduction == "sum":
            self.tau *= math.prod(networks.sampler.data_shape)
        self.velocity_var = self.log_std.detach().exp() ** 2
        self.sampler_optimizer = torch.optim.Adam(
            [
                {"params": self.network.parameters(), "lr": settings.sampler_lr},
                {"params": [self.log_std], "lr": settings.log_std_lr},
            ],
            fused=fused or None,
        )
        self.value_optimizer = torch.optim.Adam(
            self.value.parameters(), lr=settings.value_lr, fused=fused or None
        )
        factor = {
            "constant": lambda i: 1.0,
            "linear": lambda i: 1 - i / iterations,
            "cosine": lambda i: (1 + math.cos(math.pi * i / iterations)) / 2,
        }[settings.lr_decay]
        self.schedulers = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
            for optimizer in (self.sampler_optimizer, self.value_optimizer)
        ]
        self.iteration = 0

    def step(self, data: Tensor) -> dict[str, float]:
        """One iteration over a minibatch [B, *]; returns what to log."""
        settings, steps, n = self.settings, self.steps, len(data)
        every = [torch.full((n,), t, device=data.device) for t in range(steps + 1)]
        logs: dict[str, float] = {}
        self.noise.start(self.iteration)

        # 1. the whole path
        with torch.no_grad():
            x = self.initial_std * self.noise.normal("rollout", data, None)
            path = x[None]
            for t in range(steps):
                x = self.transition(x, every[t], "rollout")
                path = torch.cat((path, x[None]))

        # 2. energy
        energy_data, energy_sample = self.value(data, every[steps]), self.value(path[-1], every[steps])
        squares = (energy_data**2).mean() + (energy_sample**2).mean()
        loss = energy_data.mean() - energy_sample.mean() + settings.gamma * squares
        self.descend(loss, self.value_optimizer, settings.value_clip)
        logs["energy_loss"] = loss.item()
        logs["energy_data"], logs["energy_sample"] = energy_data.mean().item(), energy_sample.mean().item()

        # 3. values, backward in time
        for t in reversed(range(steps)):
            with torch.no_grad():
                cost = self.cost(path[t], path[t + 1], every[t])
                target = self.value(path[t + 1], every[t + 1]) + cost
            loss = nn.functional.mse_loss(self.value(path[t], every[t]), target)
            self.descend(loss, self.value_optimizer, settings.value_clip)
            logs[f"value_loss_{t}"] = loss.item()

        # 4. sampler: single steps, redrawn at random times of the path
        first = self.noise.choice(steps, data)
        rows = torch.arange(n, device=data.device)
        for i in range(settings.sampler_steps):
            timestep = (first + i) % steps
            x = path[timestep, rows]
            following = self.transition(x, timestep, f"redraw{i}")
            loss = (self.value(following, timestep + 1) + self.cost(x, following, timestep)).mean()
            self.descend(loss, self.sampler_optimizer, settings.sampler_clip)
            logs[f"sampler_loss_{i}"] = loss.item()

        # 5. adaptive velocity regularization, averages, rates
        moved = ((path[1:] - path[:-1]) ** 2).flatten(1).mean(1)
        decay = settings.velocity_decay
        self.velocity_var = decay * self.velocity_var + (1 - decay) * moved
        with torch.no_grad():
            for mean, p in zip(self.average.parameters(), self.networks.parameters(), strict=True):
                mean.mul_(settings.ema_decay).add_(p, alpha=1 - settings.ema_decay)
        for scheduler in self.schedulers:
            scheduler.step()
        self.iteration += 1
        for t in range(steps):
            logs[f"std_{t}"], logs[f"velocity_{t}"] = (
                self.log_std[t].exp().item(),
                self.velocity_var[t].item(),
            )
        return logs

    def transition(self, x: Tensor, timestep: Tensor, use: str) -> Tensor:
        """x_{t+1}, reparametrized."""
        column = (-1, *[1] * (x.ndim - 1))
        mean = self.a[timestep].view(column) * x + self.b[timestep].view(column) * self.network(x, timestep)
        return mean + self.log_std[timestep].exp().view(column) * self.noise.normal(use, x, timestep)

    def cost(self, x: Tensor, following: Tensor, timestep: Tensor) -> Tensor:
        """tau (|x_{t+1} - x_t|^2 / 2 s_t^2 - log sigma_t), [N]."""
        moved = ((following - x) ** 2).flatten(1).mean(1)
        return self.tau * (moved / (2 * self.velocity_var[timestep]) - self.log_std[timestep])

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, clip: float) -> None:
        optimizer.zero_grad()
        loss.backward()
        if clip:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
