"""Training of the Value Gradient Sampler (arXiv 2502.13280). Imports torch, the engine, the method and the
task's networks and chains."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from dxmi_ext import ops
from dxmi_ext.energies import starts
from dxmi_ext.energies.chains import GradientChain
from dxmi_ext.energies.networks import Value
from dxmi_ext.energies.replay import Replay
from dxmi_ext.energies.settings import GradientSettings, LearningSettings
from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Average, Learner
from dxmi_ext.method import noise
from dxmi_ext.method.networks import frozen
from dxmi_ext.method.stepper import Batch, Metrics, Stepper

_PATH_NOISE = 1.1  # factor of the noise of training paths
_TARGET_DECAY = 0.9  # decay of the target network's moving average
_REPLAYED = 10_000  # ends of paths from which replay chooses


class GradientTrainer(Stepper):
    """Trains the value that moves a `GradientChain`, by temporal differences, and its start.

    The chain's own value is the target network, which generates the paths and the TD targets; it is a moving
    average of the trained value.

    Args:
        chain: chain whose value and start are trained.
        learning: settings of the algorithm.
        iterations: length of the run, over which learning rates decay.
        seed: seed of every random choice.
        ranks: ranks that share the rows of a batch.
        gradient: settings of this sampler alone.

    Attributes:
        evaluations: number of evaluations of the energy so far, on all ranks; int64 scalar.
    """

    stream = "vgs"

    def __init__(
        self,
        chain: GradientChain,
        learning: LearningSettings,
        *,
        iterations: int,
        seed: int,
        ranks: Ranks | None = None,
        gradient: GradientSettings | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        assert isinstance(chain.value, Value)
        self.chain = chain
        self.online: Value = sharding.deepcopy(chain.value)
        # The average is the chain's own value.
        self.target = Average(self.online, _TARGET_DECAY)
        self._target_value = chain.value = self.target.module
        self.online.energy = self._target_value.energy = chain.energy  # one count of evaluations
        learner = functools.partial(Learner, decay=learning.lr_decay, iterations=iterations, ranks=ranks)
        value_lr = 1e-3 if learning.value_lr is None else learning.value_lr
        self.value_learner = learner(self.online, value_lr, clip=learning.value_clip, losses=("value",))
        self.start_learner = learner(chain.start, learning.start_lr, losses=("start",))
        self.learners = [self.value_learner, self.start_learner]
        self.evaluations = torch.tensor(chain.energy.count)
        device, self._replay_share = chain.start.log_std.device, (gradient or GradientSettings()).replay
        self.replay = Replay(_REPLAYED, chain.dim).to(device) if self._replay_share else None
        super().__init__(
            seed=seed,
            device=device,
            ranks=ranks,
            execution=ExecutionSettings(),
            uses=["rollout", "order0", "redraw0", *(["replay", "ends", "back"] if self.replay else [])],
        )
        # KL(N(mu, sigma^2) || N(0, kernel_var)) without its term in mu, and the change of volume.
        ratio = (2 * chain.log_std).exp() / chain.kernel_var
        each = (ratio - 1 - ratio.log()) / 2 - chain.tables().sample_coef.log()
        self._time_cost = chain.temperature * chain.dim * each

    def iterate(self, batch: Batch) -> Metrics:
        before = self.chain.energy.count
        path, outputs = self._replayed(batch) if self._replays(batch) else self._rollout(batch)
        if self.iteration == 0:
            self._center(path[-1])
        metrics = {"value_loss": self._value_steps(path, outputs, batch)}
        metrics |= starts.descend(
            self.start_learner, self.chain, self.chain.value, self.chain.value_at, batch
        )
        self.target.update()
        with torch.no_grad():
            metrics["energy_sample"] = self.chain.energy(path[-1]).mean()
        self.evaluations += (self.chain.energy.count - before) * self.ranks.world_size
        return self.ranks.mean(metrics)

    @torch.no_grad()
    def _center(self, ends: Tensor) -> None:
        """Centers the energy in values by its mean over the first paths' ends [N, D]."""
        mean = self.ranks.mean({"energy": self.chain.energy(ends).mean()})["energy"]
        self.online.center.copy_(mean.nan_to_num(0.0, 0.0, 0.0))
        self.target.copy_buffers()

    @torch.no_grad()
    def _rollout(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Paths [T + 1, N, D] with more noise than the chain's, and the outputs [T, N, D] of their steps."""
        chain, key, offset = self.chain, batch.keys["rollout"], batch.offset
        path, outputs = [chain.initial(batch.n, key, sample_offset=offset)], []
        with frozen(chain.value):
            for t in range(chain.steps):
                timestep = torch.full((batch.n,), t, device=key.device)
                x, output = chain.step(path[-1], timestep, key, noise=_PATH_NOISE, sample_offset=offset)
                path.append(x)
                outputs.append(output)
        if self.replay is not None:
            self.replay.keep(self.ranks.gather(path[-1]))
        return torch.stack(path), torch.stack(outputs)

    def _replays(self, batch: Batch) -> bool:
        """Whether this iteration trains on replayed paths, the same on all ranks."""
        if self.replay is None or self.iteration == 0:
            return False
        return float(noise.uniform((1,), batch.keys["replay"])) < self._replay_share

    @torch.no_grad()
    def _replayed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Paths drawn backwards from ends of earlier ones, and outputs; as `_rollout`.

        They keep visiting modes that the sampler has found once and might lose.
        """
        assert self.replay is not None
        chain, offset = self.chain, batch.offset
        ends = self.replay.draw(batch.n, batch.keys["ends"], sample_offset=offset)
        path = chain.backward_rollout(ends, batch.keys["back"], sample_offset=offset)
        with frozen(chain.value):
            steps = enumerate(path[:-1])
            outputs = [chain.output(x, torch.full((batch.n,), t, device=x.device)) for t, x in steps]
        return path, torch.stack(outputs)

    def _value_steps(self, path: Tensor, outputs: Tensor, batch: Batch) -> Tensor:
        """A pass over all steps of all paths; each row starts at a random step, so that a batch has all."""
        losses, rows = [], torch.arange(batch.n, device=path.device)
        residual = torch.zeros(self.chain.steps, device=path.device)
        first = noise.randint(self.chain.steps, batch.n, batch.keys["order0"], sample_offset=batch.offset)
        for shift in range(self.chain.steps):
            t = (first + shift) % self.chain.steps
            target = self._target(path[t, rows], outputs[t, rows], t, batch.keys["redraw0"], batch.offset)
            value = self.value_learner.network(path[t, rows], t)
            loss = mse_loss(value / self.chain.dim, target / self.chain.dim)
            losses.append(self.value_learner.descend("value", loss))
            residual.index_add_(0, t, (target - value.detach()) / batch.n)
        # TD errors add up along the path to the error of the whole return.
        residual = self.ranks.mean({"residual": residual.flip(0).cumsum(0).flip(0)})["residual"]
        self.online.raise_level(residual, self.iteration)
        self.target.copy_buffers()  # before the start's step
        return torch.stack(losses).mean()

    @torch.no_grad()
    def _target(self, x: Tensor, output: Tensor, t: Tensor, key: Tensor, offset: int) -> Tensor:
        """The TD target of V^t(x), [N]: the next value at a redrawn step, plus the cost of the drift.

        The noise times the gradient of the next value, which is the output, has mean 0 and is subtracted,
        since it is most of the target's variance.
        """
        chain, tables = self.chain, self.chain.tables()
        coefs = tables.sample_coef, tables.output_coef, tables.log_std
        following = ops.sampler_step(x, output, t, *coefs, key, sample_offset=offset).next_sample
        move = tables.output_coef[t, None] * output
        added = following - tables.sample_coef[t, None] * x - move
        drift = move.square().sum(1)
        next_value = chain.value_at(following, t + 1, mixed=True) - (added * output).sum(1)
        costs = tables.log_std, chain.kernel_var, self._time_cost
        return ops.td_target(next_value, drift, t, *costs, 0.0, chain.temperature)

    def parts(self) -> dict[str, Any]:
        return {
            "chain": self.chain,
            "online": self.online,
            "failures": {k: v for learner in self.learners for k, v in learner.failures.items()},
            "value_optimizer": self.value_learner.optimizer,
            "start_optimizer": self.start_learner.optimizer,
            "evaluations": self.evaluations,
            **({} if self.replay is None else {"replay": self.replay}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({"evaluations": self.evaluations, **state})  # older runs have none
