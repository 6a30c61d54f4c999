"""Algorithm 1 with its energy fixed: a policy that samples a given energy. Imports torch, the engine, the
method and the task's chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dxmi_ext.energies import starts
from dxmi_ext.energies.chains import PolicyChain
from dxmi_ext.energies.networks import Start, TargetEnergy, Value
from dxmi_ext.energies.schedule import Levels
from dxmi_ext.energies.settings import LearningSettings, PolicySettings
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Learner
from dxmi_ext.method import symptoms
from dxmi_ext.method.energy_step import spread
from dxmi_ext.method.losses import LossInputs, advantages
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import Trajectory
from dxmi_ext.method.stepper import Batch, Metrics
from dxmi_ext.method.trainer import DxMITrainer


class PolicyTrainer(DxMITrainer):
    """Trains a policy and its value on an energy without weights, and the policy's start.

    s_t^2 of the running cost starts at the variances of the schedule, so that the policy learns to reverse
    its noising kernel; adaptive velocity regularization changes it.

    Args:
        networks: networks whose sampler has a `Start`, and whose energy is a `TargetEnergy`.
        levels: noise levels of the chain.
        learning, policy: settings of the algorithm.
        temperature: w of the density exp(-E / w) / Z.
        iterations: length of the run, over which learning rates decay.
        seed: seed of every random choice.
        ranks: ranks that share the rows of a batch.

    Attributes:
        evaluations: number of evaluations of the energy so far, on all ranks; int64 scalar.
    """

    stream = "policy"

    def __init__(
        self,
        networks: Networks,
        levels: Levels,
        learning: LearningSettings,
        policy: PolicySettings,
        *,
        temperature: float,
        iterations: int,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        self._learning_settings, self._temperature = learning, temperature
        algorithm = policy.algorithm(learning, temperature)
        super().__init__(networks, algorithm, iterations=iterations, seed=seed, ranks=ranks)
        self.costs.velocity_var.copy_(levels.variance)
        self._std_floor = policy.std_floor
        self._chain = PolicyChain(networks, self.costs.velocity_var, temperature)
        self.evaluations = torch.tensor(self._chain.energy.count)

    @property
    def chain(self) -> PolicyChain:
        """The chain of the averaged networks."""
        return PolicyChain(self.averaged, self.costs.velocity_var, self._temperature)

    def _make_learners(self, ranks: Ranks) -> None:
        super()._make_learners(ranks)
        start, s = self.sampler.start, self._learning_settings
        assert isinstance(start, Start) and isinstance(self.networks.energy_network, TargetEnergy)
        self.start_learner = Learner(start, s.start_lr, s.lr_decay, self.iterations, ranks, losses=("start",))
        self.learners = [*self.learners, self.start_learner]

    def iterate(self, batch: Batch) -> Metrics:
        before = self._chain.energy.count
        metrics = super().iterate(batch)
        self.evaluations += (self._chain.energy.count - before) * self.ranks.world_size
        return metrics

    def _energy_step(self, path: Trajectory, batch: Batch) -> Metrics:
        """One step of the start; the energy is fixed."""
        samples = path.samples[-1]
        with torch.no_grad():
            energy = self.networks.energy(samples).mean()
        value = self.value, self.networks.value_at
        started = starts.descend(self.start_learner, self._chain, *value, batch)
        return {"energy_sample": energy, "sample_spread": spread(samples), **started}

    def _value_steps(self, path: Trajectory, batch: Batch) -> Tensor:
        assert isinstance(self.value, Value)
        if self.iteration == 0:
            with torch.no_grad():
                energy = self.networks.energy(path.samples[-1]).mean()
            self.value.center.copy_(self.ranks.mean({"energy": energy})["energy"].nan_to_num(0.0, 0.0, 0.0))
        residual = advantages(LossInputs(self.networks, self.sampler, self.costs, path, batch)).mean(1)
        self.value.raise_level(self.ranks.mean({"residual": residual})["residual"], self.iteration)
        return super()._value_steps(path, batch).mean()

    def _sampler_steps(self, path: Trajectory, batch: Batch) -> Tensor:
        losses = super()._sampler_steps(path, batch)
        raise_stds_(self.sampler.log_std, self.costs.velocity_var, self._std_floor)
        return losses

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        ratios = [now / before for now, before in zip(numbers["std"], self._initial_std, strict=True)]
        stds, why = symptoms.STDS, f"{min(ratios):.3g} to {max(ratios):.3g} of where it started"
        found = {"sigma blow-up": max(ratios) > stds[1], "sigma collapse": min(ratios) < stds[0]}
        return {name: why for name, is_so in found.items() if is_so}

    def parts(self) -> dict[str, Any]:
        own = {"start_optimizer": self.start_learner.optimizer, "evaluations": self.evaluations}
        return super().parts() | own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"evaluations": self.evaluations, **state})  # older runs have none


@torch.no_grad()
def raise_stds_(log_std: Tensor, velocity_var: Tensor, floor: float) -> None:
    """Raises each step's sigma to a share of its noising kernel's standard deviation, in place. Importance
    weights are bounded only where the sampler's tails are no lighter than the kernel's, and between modes the
    exact reverse step is wider than the kernel.

    Args:
        log_std: [T].
        velocity_var: variance of the kernel, [T].
        floor: share; 0: nothing is raised.
    """
    if floor:
        log_std.copy_(torch.maximum(log_std, velocity_var.log() / 2 + math.log(floor)))
