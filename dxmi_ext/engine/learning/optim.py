"""Optimizer steps and learning rates over a run. Imports torch and the engine."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.arguments import is_integer
from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.settings import ConfigError


class Adam(torch.optim.Adam):
    """Fused Adam with gradient clipping that skips steps whose loss or gradients are not finite.

    The decision is made on the device, without a synchronization.

    Args:
        params: parameters, or groups of them.
        lr: learning rate of groups without their own.
        clip: maximum gradient norm; 0: no clipping.
        betas: decays of the means of gradients and of their squares.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        clip: float = 0.0,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, fused=True)
        self.clip = clip
        device = self._weights()[0].device
        if device.type == "cuda":  # tensors, which a CUDA graph reads on every replay
            for group in self.param_groups:
                group |= {"lr": torch.tensor(group["lr"], device=device), "capturable": True}
        self.found_inf: Tensor  # torch's fused optimizers skip a step if it is 1

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "clip": self.clip}  # for copies of a trainer

    def descend(self, loss: Tensor, failures: Tensor) -> None:
        """One step on a loss.

        Args:
            loss: a scalar.
            failures: number of consecutive skipped steps, a scalar that this step updates.
        """
        weights = self._weights()
        for p in weights:
            p.grad = None
        # 1 or NaN: a loss that is not finite makes every gradient NaN, also on other ranks.
        loss.backward(loss.detach() * 0 + 1)
        norm = sharding.total_norm([p.grad for p in weights if p.grad is not None])
        if self.clip:
            for kind in sharding.alike(weights):
                nn.utils.clip_grads_with_norm_(kind, self.clip, norm)
        self.found_inf = (norm < math.inf).logical_not().float()  # 1 for NaN too
        failures.add_(1).mul_(self.found_inf)
        if any(map(sharding.is_sharded, weights)):
            self.step()
        else:
            with torch.no_grad():
                self._step_whole()

    def _step_whole(self) -> None:
        """`step` on weights that are not sharded, without torch's hooks and checks, which cost as much as the
        update of a small network."""
        taken = 1 - self.found_inf
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:  # all are frozen
                continue
            states = [self.state[p] or self._new_state(p) for p in weights]
            moments, squares, steps = (
                [state[name] for state in states] for name in ("exp_avg", "exp_avg_sq", "step")
            )
            torch._foreach_add_(steps, [taken] * len(steps))
            torch._fused_adam_(
                weights,
                [p.grad for p in weights],
                moments,
                squares,
                [],
                steps,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
                found_inf=self.found_inf,
            )

    def _new_state(self, weight: Tensor) -> dict[str, Tensor]:
        state = self.state[weight]
        state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        state = dict(state_dict)
        # Moments are sharded like their weights; step counts are scalars.
        state["state"] = {
            i: {key: sharding.like(v, p if v.shape else v) for key, v in state["state"][i].items()}
            for i, p in enumerate(self._weights())
            if i in state["state"]
        }
        # Tensors on this device, which may differ from the state's; a schedule sets their values.
        kept = [{key: group[key] for key in ("lr", "capturable")} for group in self.param_groups]
        super().load_state_dict(state)
        for group, mine in zip(self.param_groups, kept, strict=True):
            group |= mine
        # Copies, since the state may be that of an optimizer in use. Fused kernels require the same strides
        # for a weight and its moments.
        for weight, moments in self.state.items():
            for name, moment in moments.items():
                same = moment.shape == weight.shape
                moments[name] = torch.empty_like(weight).copy_(moment) if same else moment.clone()

    def _weights(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


class LearningRates:
    """Scales an optimizer's learning rates over a run; a function of the iteration, so it has no state.

    Args:
        optimizer: optimizer with the initial learning rates.
        decay: constant, linear (to 0) or cosine (to 0).
        iterations: length of the run.
        wait: number of first iterations with learning rate 0.
        warmup: number of first iterations in which the learning rates rise linearly.

    Attributes:
        scale: factor of all learning rates; a rollback lowers it.

    Raises:
        ConfigError: iterations is not an integer >= 0.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, decay: str, iterations: int, *, wait: int = 0, warmup: int = 0
    ) -> None:
        if not is_integer(iterations) or iterations < 0:
            raise ConfigError(f"iterations must be an integer >= 0, got {iterations!r}")
        self._optimizer, self._decay, self._iterations = optimizer, decay, int(iterations)
        self._wait, self._warmup, self.scale = wait, warmup, 1.0
        self._initial = [float(group["lr"]) for group in optimizer.param_groups]

    def at(self, iteration: int) -> None:
        """Sets the learning rates of an iteration.

        Raises:
            ConfigError: the run has fewer iterations.
        """
        if iteration >= self._iterations:
            raise ConfigError(f"iterations must be > {iteration} to train further, got {self._iterations}")
        done = iteration / self._iterations
        decays = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
        factor = self.scale * decays[self._decay]
        if iteration < self._warmup:
            factor *= (iteration + 1) / (self._warmup + 1)
        for group, lr in zip(self._optimizer.param_groups, self._initial, strict=True):
            now = lr * factor if iteration >= self._wait else 0.0
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(now)
            else:
                group["lr"] = now
