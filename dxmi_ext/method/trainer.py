"""DxMI's training iteration (DxMI, Alg. 1 and 2). Imports torch, the engine and the method."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine import settings
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.engine.compute.execution import ExecutionSettings, check_graph
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Average, Learner
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise, symptoms, trial
from dxmi_ext.method.costs import Costs, density_temperature
from dxmi_ext.method.energy_step import energy_step
from dxmi_ext.method.langevin import Langevin, LangevinSettings
from dxmi_ext.method.lengths import draw_length, lengths_of
from dxmi_ext.method.losses import SAMPLER_LOSSES, LossInputs, energy_loss
from dxmi_ext.method.networks import Networks, frozen, prepare
from dxmi_ext.method.sampler import ExpectedStep, LogProb, Trajectory, Transition
from dxmi_ext.method.settings import CHAIN_RULES, RULES, DxMISettings
from dxmi_ext.method.stepper import Batch, Metrics, Stepper


class DxMITrainer(Stepper):
    """Trains a sampler, a value and an energy jointly.

    Args:
        networks: sampler, value and energy.
        algorithm: settings; ``negatives`` is sampler or refined.
        iterations: length of the run, over which learning rates decay.
        seed: seed of every random choice; each is keyed by the global row, whatever the split of the batch.
        ranks: ranks that share the rows of a batch.
        langevin: settings of the chains that refine negatives.
        execution: precision and compilation of the networks.

    Attributes:
        averaged: the networks with averaged weights, for evaluation.

    Raises:
        ConfigError: settings conflict with each other, with the networks or with the device.
    """

    stream = "dxmi"

    def __init__(
        self,
        networks: Networks,
        algorithm: DxMISettings,
        *,
        iterations: int,
        seed: int,
        ranks: Ranks | None = None,
        langevin: LangevinSettings | None = None,
        execution: ExecutionSettings | None = None,
    ) -> None:
        langevin, execution = langevin or LangevinSettings(), execution or ExecutionSettings()
        _check(networks, algorithm, langevin, execution, ranks := ranks or Ranks())
        self.networks, self.algorithm, self.langevin = networks, algorithm, langevin
        self.iterations = iterations
        self.sampler, self.value = networks.sampler, networks.value
        self.data_shape = self.sampler.data_shape
        prepare(execution, networks)
        self.memory_format = self.sampler.memory_format
        ranks.equalize_(networks)
        networks.shard_(ranks)
        self.costs = Costs(algorithm, self.sampler, ranks)
        if algorithm.train_last_std:
            self.sampler.train_last_std()
        else:
            self.sampler.fix_last_std()  # before the average copies it
        self.average = Average(networks, algorithm.ema_decay)
        self.averaged = self.average.module
        self._initial_std = self.sampler.log_std.detach().exp().tolist()
        self._make_learners(ranks)
        self._langevin = Langevin.of(langevin, density_temperature(algorithm, self.sampler.dim))
        self._energy_loss = energy_loss(algorithm)
        super().__init__(
            seed=seed,
            device=self.sampler.log_std.device,
            ranks=ranks,
            execution=execution,
            uses=_uses(algorithm),
            graphed=execution.cuda_graph,
        )

    def _make_learners(self, ranks: Ranks) -> None:
        s, sampler, energy = self.algorithm, self.sampler, self.networks.energy_network
        learner = functools.partial(
            Learner, decay=s.lr_decay, iterations=self.iterations, ranks=ranks, betas=s.adam_betas
        )
        weights = [
            {"params": list(sampler.network.parameters())},
            {"params": sampler.std_weights(), "lr": s.log_std_lr},
        ]
        steps: nn.Module = ExpectedStep(sampler) if s.expected_cost else sampler
        self.sampler_learner = learner(
            LogProb(sampler) if s.sampler_update == "policy_gradient" else steps,
            s.sampler_lr,
            weights=weights,
            clip=s.sampler_clip,
            wait=s.sampler_wait,
            losses=("sampler",),
        )
        shared = ("energy", "value") if energy is None else ("value",)
        self.value_learner = learner(self.value, s.value_lr, clip=s.value_clip, losses=shared)
        self.energy_learner, self.learners = self.value_learner, [self.value_learner, self.sampler_learner]
        if energy is not None and _is_trainable(energy):
            self.energy_learner = learner(energy, s.energy_lr, clip=s.energy_clip, losses=("energy",))
            self.learners = [self.energy_learner, *self.learners]
        # Value and energy as wrapped for training.
        learns = self.energy_learner is not self.value_learner
        self._learning = Networks(
            sampler, self.value_learner.network, self.energy_learner.network if learns else energy
        )

    def try_networks(self, data: Tensor, labels: Tensor | None) -> None:
        n, end, energy = len(data), self.sampler.end, self.networks.energy_network
        x = data.to(self.sampler.log_std.dtype)
        for name, network, last, shape in (
            ("network of the sampler", self.sampler.network, end - 1, x.shape),
            ("value", self.value, end if energy is None else end - 1, (n,)),
        ):
            why = f" with timesteps 0 to {last} ({'T' if last == end else 'T - 1'})"
            time = trial.timesteps(last, n, x.device)
            trial.check(name, network, x, time, labels, shape=shape, why=why)
        if energy is not None:
            trial.check("energy", energy, x, None, labels, shape=(n,))
        if self.costs.temperature is not None:
            self.costs.temperature.check(data)

    def begin(self) -> None:
        self.costs.begin(self.iteration / self.iterations)
        draw_length(self.sampler, self._seed, self.iteration)

    def iterate(self, batch: Batch) -> Metrics:
        """One iteration of Algorithm 1 or 2, on chains of the current length."""
        path = self._rollout(batch)
        batch = self._noised(batch)
        metrics = self._energy_step(path, batch)
        metrics["value_loss"] = self._value_steps(path, batch)
        metrics["sampler_loss"] = self._sampler_steps(path, batch)
        metrics = self.ranks.mean(metrics | path.means())
        adapted = self.costs.adapt(metrics["sq_displacement"], batch.data, path.samples[-1])
        # While tau falls, the energy becomes a poorer detector; its average stays as it was.
        self.average.update("sampler" if self.costs.cools else None)
        return self._logged(metrics) | adapted | self._tables()

    def _rollout(self, batch: Batch) -> Trajectory:
        key, labels = batch.keys["rollout"], batch.labels
        return self.sampler.rollout(batch.n, key, labels, data=batch.data, sample_offset=batch.offset)

    def _noised(self, batch: Batch) -> Batch:
        """The batch with noise of standard deviation ``data_noise`` on its data."""
        std = self.algorithm.data_noise
        if not std:
            return batch
        data, key = batch.data, batch.keys["data_noise"]
        z = ops.normal(data.shape, key, sample_offset=batch.offset, dtype=data.dtype)
        return batch._replace(data=data + std * z)  # in the memory format of the data

    def _energy_step(self, path: Trajectory, batch: Batch) -> Metrics:
        """Lowers the energy of data and raises the energy of the sampler's samples, refined by Langevin
        chains if so set."""
        if "energy" not in self.energy_learner.failures:
            kind = type(self.networks.energy_network).__name__
            raise ConfigError(
                f"energy must have weights to train, got {kind} without any that require grad; "
                "`dxmi train energy` samples a given energy"
            )
        samples = path.samples[-1]
        if self.algorithm.negatives == "refined":
            key, offset = batch.keys["refine"], batch.offset
            samples = self._langevin(self.networks, samples, key, batch.labels, sample_offset=offset).samples
        return energy_step(self.energy_learner, self._learning, self._energy_loss, batch, samples)

    def _value_steps(self, path: Trajectory, batch: Batch) -> Tensor:
        """Temporal-difference learning: each step uses the value updated by the one before, unless targets
        are the returns of whole paths."""
        losses, returns = [], self._returns(path, batch) if self.algorithm.td_lambda else None
        for timestep, step in self._td_steps(path, batch):
            target = self._target(step, timestep, batch) if returns is None else returns[step.place]
            value = call(self.value_learner.network, step.sample, timestep, batch.labels)
            loss = nn.functional.mse_loss(value, target)
            self.value_learner.descend("value", self.algorithm.td_weight * loss)
            losses.append(loss.detach())
        return torch.stack(losses[::-1])  # computed from the last step to the first

    @torch.no_grad()
    def _target(self, step: Transition, timestep: Tensor, batch: Batch) -> Tensor:
        """The target of V^t(x_t) from the next value, [B] (DxMI, eq. 9)."""
        following, sq_displacement = step.next_sample, step.sq_displacement
        if self.algorithm.td_redraw:
            key, offset = batch.keys["td_redraw"], batch.offset
            redrawn = self.sampler(step.sample, timestep, key, batch.labels, sample_offset=offset)
            following, _, sq_displacement = redrawn
        next_value = self.networks.value_at(following, self.sampler.after(timestep), batch.labels)
        return self.costs.td_target(next_value, sq_displacement, timestep)

    @torch.no_grad()
    def _returns(self, path: Trajectory, batch: Batch) -> Tensor:
        """The targets of all values of a path by TD(lambda), [T, B] (Sutton & Barto 2018, ch. 12).

        With one-step targets, V^t learns from an error of V^{t+1}, and errors add up toward the start of a
        long chain. Longer returns depend on the energy at its end; they are not noisier, since the noise of
        the steps taken cancels (`Costs.entropy_noise`).
        """
        weight, returns = self.algorithm.td_lambda, list[Tensor]()
        for t in reversed(range(self.sampler.steps)):
            timestep = self.sampler.timestep(t, batch.n)
            after = self.sampler.after(timestep)
            following = self.networks.value_at(path.samples[t + 1], after, batch.labels)
            if returns:
                following = following.lerp(returns[-1], weight)
            target = self.costs.td_target(following, path.sq_displacement[t], timestep)
            returns.append(target + self.costs.entropy_noise(path.log_prob[t], timestep))
        return torch.stack(returns[::-1])

    def _td_steps(self, path: Trajectory, batch: Batch) -> Iterator[tuple[Tensor, Transition]]:
        """The timesteps [B] and transitions that the value learns from, each transition of the path once."""
        steps = self.sampler.steps
        if self.algorithm.td_order == "backward":
            for step in reversed(range(steps)):
                yield self.sampler.timestep(step, batch.n), path.step(step)
        else:
            first = noise.randint(steps, batch.n, batch.keys["td_choice"], sample_offset=batch.offset)
            for i in range(steps):
                t = (first + i) % steps
                yield self.sampler.timesteps[t], path.at(t)

    def _sampler_steps(self, path: Trajectory, batch: Batch) -> Tensor:
        """Updates the sampler on single steps at random times of the path, or on whole paths."""
        steps, losses = self.sampler.steps, []
        # First step of each particle.
        first = noise.randint(steps, batch.n, batch.keys["choice"], sample_offset=batch.offset)
        with frozen(self.value, self.networks.energy_network):
            inputs = LossInputs(self.networks, self.sampler_learner.network, self.costs, path, batch)
            loss = SAMPLER_LOSSES[self.algorithm.sampler_update](inputs)
            for i in range(self.algorithm.sampler_steps):
                at = loss((first + i) % steps, batch.keys[f"redraw{i}"])
                losses.append(self.sampler_learner.descend("sampler", at))
                self.sampler.bound_std()
        return torch.stack(losses)

    def _logged(self, metrics: Metrics) -> Metrics:
        """Means over the chain if chains have several lengths, so that logged shapes stay the same."""
        if len(lengths_of(self.sampler)) == 1:
            return metrics
        return metrics | {k: metrics[k].mean() for k in ("log_prob", "sq_displacement", "value_loss")}

    def _tables(self) -> Metrics:
        return {
            "std": self.sampler.log_std.detach().exp(),
            "velocity_var": self.costs.velocity_var.clone(),
        }

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return symptoms.of(numbers, self._initial_std)

    def parts(self) -> dict[str, Any]:
        learners = {"sampler": self.sampler_learner, "value": self.value_learner}
        if self.energy_learner is not self.value_learner:
            learners["energy"] = self.energy_learner
        return {
            "networks": self.networks,
            "averaged": self.averaged,
            **self.costs.parts(),
            "failures": {k: v for learner in self.learners for k, v in learner.failures.items()},
            **{f"{name}_optimizer": learner.optimizer for name, learner in learners.items()},
        }


def _check(
    networks: Networks,
    algorithm: DxMISettings,
    langevin: LangevinSettings,
    execution: ExecutionSettings,
    ranks: Ranks,
) -> None:
    """Raises a ConfigError for wrong types and unsupported combinations."""
    for name, value, wanted in (
        ("networks", networks, Networks),
        ("algorithm", algorithm, DxMISettings),
        ("langevin", langevin, LangevinSettings),
        ("execution", execution, ExecutionSettings),
        ("ranks", ranks, Ranks),
    ):
        if not isinstance(value, wanted):
            raise ConfigError(f"{name} must be {wanted.__name__}, got {type(value).__name__}")
    settings.check((*RULES, *CHAIN_RULES), algorithm, langevin)
    check_graph(execution, networks.sampler.log_std.device, ranks)
    for name, part in (("sampler", networks.sampler), ("value", networks.value)):
        if not _is_trainable(part):
            kind = type(part).__name__
            raise ConfigError(f"{name} must have weights to train, got {kind} without any that require grad")
    if shared := _shared(networks):
        raise ConfigError(
            f"sampler must share no weights with value or energy, which its loss does not train, got {shared}"
        )
    if algorithm.skip_last > networks.sampler.end:
        raise ConfigError(f"skip_last must be <= T = {networks.sampler.end}, got {algorithm.skip_last}")
    if (still := networks.sampler.log_std.detach().isneginf()).any():
        raise ConfigError(
            f"sigma must be > 0 for training, got 0 at timestep {int(still.nonzero()[0])}; "
            "set_last_std(1e-6) adds almost no noise"
        )
    if execution.cuda_graph and algorithm.tau_cooling < 1:
        raise ConfigError(f"tau_cooling must be 1 with cuda_graph, got {algorithm.tau_cooling}")
    if not algorithm.trains_sampler:
        raise ConfigError(f"negatives must be sampler or refined, got {algorithm.negatives}")
    if len(lengths_of(networks.sampler)) > 1 and (execution.cuda_graph or algorithm.skip_last):
        raise ConfigError("cuda_graph and skip_last must be off with chains of several lengths")


def _is_trainable(network: nn.Module) -> bool:
    return any(p.requires_grad for p in network.parameters())


def _shared(networks: Networks) -> str:
    """Names of trained weights of the sampler that are also those of the value or the energy."""
    parts = [part for part in (networks.value, networks.energy_network) if part is not None]
    others = {id(p) for part in parts for p in part.parameters()}
    trained = networks.sampler.network.named_parameters()
    return ", ".join(name for name, p in trained if p.requires_grad and id(p) in others)


def _uses(s: DxMISettings) -> list[str]:
    """The noise keys of an iteration."""
    uses = ["rollout", "choice", *(f"redraw{i}" for i in range(s.sampler_steps))]
    if s.td_order == "shuffled":
        uses.append("td_choice")
    if s.td_redraw:
        uses.append("td_redraw")
    if s.negatives == "refined":
        uses.append("refine")
    if s.data_noise:
        uses.append("data_noise")
    return uses
