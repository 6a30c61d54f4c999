"""DxMI's training iteration (DxMI, Alg. 1 and 2). Imports torch, ``dxmi_ext.ops`` and what lies between."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext import health, noise, ops, sharding, speed
from dxmi_ext.config import ConfigError, setting
from dxmi_ext.energy_step import energy_step, loss_of
from dxmi_ext.graphs import Graphed
from dxmi_ext.langevin import Langevin, LangevinSettings
from dxmi_ext.networks import Networks, frozen
from dxmi_ext.optim import Adam, LearningRates
from dxmi_ext.ranks import Ranks
from dxmi_ext.sampler import LogProb, Trajectory, Transition, conditioned
from dxmi_ext.speed import SpeedSettings
from dxmi_ext.temperature import Temperature


class Stepper(Protocol):
    """What a run repeats: an iteration over a batch, with a state that resumes exactly."""

    iteration: int

    def step(self, batch: Any) -> dict[str, Tensor]:
        """What to log; of each loss also ``NAME_failures``, its steps in a row that were not finite."""

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        """What a step's metrics show to be wrong, by name."""

    def retry(self, attempt: int, lr_scale: float) -> None:
        """Goes on with other noise, and rates scaled; attempt 0 is how it was made."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass
class DxMISettings(LangevinSettings, SpeedSettings):
    """Settings of the algorithm, in the paper's symbols. The defaults are Algorithm 1.

    Algorithm 2 is ``costs_in=sampler time_cost=sigmoid`` with a value network that does not see the timestep.

    Raises:
        ConfigError: a setting is out of its bounds, or another one leaves it without effect.
    """

    heading = "the algorithm"

    tau: float = setting(0.1, "temperature of entropy and running cost", minimum=0)
    tau_entropy: float | None = setting(None, "of the entropy alone (tau_1); null: tau", minimum=0)
    tau_velocity: float | None = setting(None, "of the running cost alone (tau_2); null: tau", minimum=0)
    tau_rate: float = setting(
        0.0, "how fast tau follows the data's entropy; 0: it stays as it is", minimum=0, maximum=1
    )
    tau_margin: float = setting(
        0.1,
        "with tau_rate, nats a dimension by which the samples' entropy is to exceed the data's; it falls to "
        "0 in the second half of the run",
    )
    energy_loss: str = setting(
        "contrast",
        "of the energy: contrast, the paper's; noise_contrastive: samples count the less the higher their "
        "energy is already (N2CE)",
        choices=("contrast", "noise_contrastive"),
    )
    noise_magnitude: float = setting(
        10.0, "M of N2CE, at which likelihood takes the place of classification", minimum=1
    )
    gamma: float = setting(1.0, "weight of the squared energies in the energy loss", minimum=0)
    cost_reduction: str = setting(
        "mean", "of costs over data dimensions; sum multiplies tau by D", choices=("mean", "sum")
    )
    costs_in: str = setting(
        "both",
        "what entropy and running cost enter: both losses, or one",
        choices=("both", "value", "sampler"),
    )
    time_cost: str = setting(
        "none", "R(t) in the value's target: linear is .05 a step", choices=("none", "linear", "sigmoid")
    )
    skip_last: int = setting(0, "how many of the last steps carry no entropy and no running cost", minimum=0)
    td_order: str = setting(
        "backward",
        "steps that the value learns from in turn; shuffled: each row its own, from a random one on",
        choices=("backward", "shuffled"),
    )
    td_redraw: bool = setting(False, "redraw x_{t+1} from the current sampler for the value's target")
    td_weight: float = setting(
        1.0,
        "of the value's squared errors; below 1 an energy that shares the value's weights and optimizer has "
        "the greater say against its T steps",
        minimum=0,
    )
    velocity_decay: float = setting(
        0.99, "alpha of adaptive velocity regularisation; 1: off", minimum=0, maximum=1
    )
    sampler_update: str = setting(
        "dxdp",
        "of the sampler: dynamic programming, the policy gradient of GCD, or back-propagation through whole "
        "paths, which leaves the value unused",
        choices=("dxdp", "policy_gradient", "backprop"),
    )
    sampler_steps: int = setting(
        2, "sampler steps an iteration; T of them use the whole path", minimum=1, maximum=1000
    )
    sampler_wait: int = setting(
        0, "first iterations in which the sampler stands still, until a new energy tells anything", minimum=0
    )
    train_last_std: bool = setting(True, "false: the last step keeps its sigma")
    sampler_lr: float = setting(5e-4, "learning rate of the sampler's network", minimum=0)
    log_std_lr: float = setting(1.5e-3, "learning rate of log sigma", minimum=0)
    value_lr: float = setting(
        1e-3, "learning rate of the value, and of an energy that is part of it", minimum=0
    )
    energy_lr: float = setting(1e-3, "learning rate of an energy network of its own", minimum=0)
    lr_decay: str = setting("linear", "learning rates over the run", choices=("constant", "linear", "cosine"))
    sampler_clip: float = setting(0.1, "largest gradient norm of the sampler; 0: any", minimum=0)
    value_clip: float = setting(0.0, "largest gradient norm of the value; 0: any", minimum=0)
    energy_clip: float = setting(0.0, "largest gradient norm of an energy of its own; 0: any", minimum=0)
    cuda_graph: bool = setting(False, "the whole iteration as one CUDA graph; wants batches of one shape")
    ema_decay: float = setting(
        0.995, "decay of the averaged networks, used for evaluation", minimum=0, below=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if None not in (self.tau_entropy, self.tau_velocity) and self.changed("tau"):
            raise ConfigError(f"tau: got {self.tau}, but tau_entropy and tau_velocity both take its place")
        costs = self.tau if self.tau_entropy is None else self.tau_entropy
        costs += self.tau if self.tau_velocity is None else self.tau_velocity
        if self.sampler_update != "dxdp" and self.costs_in == "value" and costs:
            raise ConfigError(
                f"costs_in: got 'value', but with sampler_update={self.sampler_update} the sampler does not "
                "learn from the value, so no cost would reach it; wants both or sampler"
            )
        if self.changed("noise_magnitude") and self.energy_loss == "contrast":
            raise ConfigError(
                f"noise_magnitude: got {self.noise_magnitude}, wants energy_loss=noise_contrastive with it"
            )
        if self.tau_rate and not density_temperature(self, 1):
            raise ConfigError(
                f"tau_rate: got {self.tau_rate}, but the entropy's tau is 0; wants one to start from"
            )
        chains = self.negatives == "refined" and self.langevin_noise is None
        if self.tau_rate and (chains or not self.trains_sampler):
            raise ConfigError(
                f"tau_rate: got {self.tau_rate}, but Langevin chains do not follow it; wants "
                "negatives=sampler, or refined with langevin_noise"
            )


def check_cuda_graph(settings: DxMISettings, device: torch.device, ranks: Ranks) -> None:
    """Refuses a CUDA graph where there can be none; for recipes, before they pretrain.

    Raises:
        ConfigError: it is wanted without a CUDA device, or with many ranks.
    """
    if settings.cuda_graph and (device.type != "cuda" or not ranks.alone):
        raise ConfigError("cuda_graph: got true, wants a CUDA device and a single rank")


def check_energy_settings(settings: DxMISettings, value_kind: str) -> None:
    """Refuses settings of an energy network of its own where there is none.

    Raises:
        ConfigError: there is none, but they are set.
    """
    for key in ("energy_lr", "energy_clip"):
        if settings.changed(key) and value_kind != "separate":
            raise ConfigError(
                f"{key}: got {getattr(settings, key)}, but with value_kind={value_kind} the energy is "
                f"part of the value; set {key.replace('energy', 'value')}, or value_kind=separate"
            )


def density_temperature(settings: DxMISettings, dim: int) -> float:
    """w in the density exp(-E / w) / Z that a sampler of `dim` dimensions is to have: the weight of the
    entropy, a sum over dimensions (DxMI, sec. 2). 0 where there is no entropy."""
    tau = settings.tau if settings.tau_entropy is None else settings.tau_entropy
    return tau if settings.cost_reduction == "sum" else tau / dim


def time_costs(kind: str, steps: int) -> Tensor:
    """R(t), [T]: the fixed costs of Algorithm 2 (DxMI, sec. 4). sigmoid sums to about 1 over the path."""
    t = torch.arange(steps, dtype=torch.float64)
    return {
        "none": torch.zeros_like(t),
        "linear": torch.full_like(t, 0.05),
        "sigmoid": torch.sigmoid(steps / 2 - t) - torch.sigmoid(steps / 2 - t - 1),
    }[kind]


class DxMITrainer:
    """Trains a sampler, a value and an energy together.

    Args:
        networks: all of them.
        settings: of the algorithm; ``negatives`` is sampler or refined.
        iterations: length of the run, over which learning rates decay.
        seed: of every random choice; each is keyed by the global row, so none depends on the batch's split.
        ranks: among which the rows of a batch are split.
    """

    def __init__(
        self,
        networks: Networks,
        settings: DxMISettings,
        *,
        iterations: int,
        seed: int,
        ranks: Ranks | None = None,
    ) -> None:
        if not settings.trains_sampler:
            raise ConfigError(f"negatives: got {settings.negatives!r}, wants sampler or refined")
        self.networks, self.settings, self.ranks = networks, settings, ranks or Ranks()
        self.sampler, self.value = sampler, value = networks.sampler, networks.value
        self.iterations, self.iteration = iterations, 0
        log_std = sampler.log_std.detach()
        self._initial_std = log_std.exp().tolist()
        self.velocity_var = (2 * log_std).exp()  # s_t^2 starts at sigma_t^2
        costs = [time_costs(settings.time_cost, steps) for steps in sampler.lengths]
        self.time_cost = torch.cat(costs).to(log_std)
        self.temperature = Temperature(
            settings.tau_rate, log_std.new_ones(()), self.ranks, margin=settings.tau_margin
        )
        self._dim = math.prod(sampler.data_shape)
        speed.prepare(settings, sampler, value, networks.energy_network)
        for network in (sampler.network, value, networks.energy_network):
            if network is not None:
                self.ranks.shard_(network)
        # An exponential moving average, for evaluation. torch's AveragedModel would wait for the device.
        self.averaged = sharding.deepcopy(networks).requires_grad_(False).eval()
        self._average = get_ema_multi_avg_fn(settings.ema_decay)
        self._averages = list(self.averaged.parameters()), list(networks.parameters())
        weights = [
            {"params": list(sampler.network.parameters())},
            {"params": [sampler.log_std], "lr": settings.log_std_lr},
        ]
        self.sampler_optimizer = Adam(weights, settings.sampler_lr, settings.sampler_clip)
        self.value_optimizer = Adam(value.parameters(), settings.value_lr, settings.value_clip)
        self.energy_optimizer = self.value_optimizer
        if networks.energy_network is not None:
            self.energy_optimizer = Adam(
                networks.energy_network.parameters(), settings.energy_lr, settings.energy_clip
            )
        # Steps in a row that were not finite, by loss: energy and value may share an optimizer.
        self._failures = {name: log_std.new_zeros(()) for name in ("energy", "value", "sampler")}
        if not settings.train_last_std:
            trained = torch.ones_like(log_std)
            trained[sampler.following == sampler.end] = 0
            sampler.log_std.register_hook(lambda grad: grad * trained)
        # The networks as they are called where they learn.
        wrap, energy = self.ranks.wrap, networks.energy_network
        self._learning = Networks(sampler, wrap(value), None if energy is None else wrap(energy))
        by_score = settings.sampler_update == "policy_gradient"
        self._learning_sampler = wrap(LogProb(sampler) if by_score else sampler)
        waits = [settings.sampler_wait * (name == "sampler") for name in self._optimizers()]
        self._learning_rates = LearningRates(
            list(self._optimizers().values()), settings.lr_decay, iterations, waits
        )
        uses = ["rollout", "choice", *(f"redraw{i}" for i in range(settings.sampler_steps))]
        uses += ["td_choice"] * (settings.td_order == "shuffled") + ["td_redraw"] * settings.td_redraw
        uses += ["refine"] * (settings.negatives == "refined")
        self._langevin = Langevin.of(settings, density_temperature(settings, self._dim))
        self._energy_loss = loss_of(settings.energy_loss, settings.gamma, settings.noise_magnitude)
        self._uses, self._seed = uses, seed
        self.retry(0, 1.0)
        self._iterate: Callable[..., dict[str, Tensor]] = self._iteration_of
        check_cuda_graph(settings, log_std.device, self.ranks)
        if len(sampler.lengths) > 1 and (settings.cuda_graph or settings.skip_last):
            raise ConfigError(
                "cuda_graph, skip_last: got one of them, wants none with chains of several lengths"
            )
        if settings.cuda_graph:
            self._iterate = Graphed(self._iteration_of)

    def retry(self, attempt: int, lr_scale: float) -> None:
        stream = f"dxmi, attempt {attempt}" if attempt else "dxmi"
        self._draws = noise.Draws(self._seed, stream, self._uses, self.velocity_var.device)
        self._learning_rates.scale = lr_scale

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return health.symptoms(numbers, self._initial_std)

    def step(self, batch: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """One iteration of Algorithm 1 or 2, on chains of a length drawn from those that the sampler knows.

        Args:
            batch: this rank's rows: data [B, *], or data and labels [B].

        Returns:
            What to log, on the device: scalars, and vectors, of one value a step of the chain or of the
            tables, or of one a sampler step. Of several lengths, means over the chain.
        """
        data, labels = batch if isinstance(batch, tuple) else (batch, None)
        data = data.contiguous(memory_format=self.sampler.memory_format)
        self._learning_rates.at(self.iteration)
        if self.settings.tau_rate:
            self.temperature.at(self.iteration / self.iterations)
        # The same on all ranks, and after a resume.
        self.sampler.use(random.Random(f"{self._seed} {self.iteration}").choice(self.sampler.lengths))
        with speed.running(self.settings, data.device):
            metrics = self._iterate(self._draws.keys(self.iteration), data, labels)
        self.iteration += 1
        return metrics

    def _iteration_of(self, drawn: Tensor, data: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """What the device does in an iteration, whose noise keys are `drawn`."""
        keys = self._draws.named(drawn)
        self._offset = self.ranks.rank * len(data)
        path = self.sampler.rollout(len(data), keys["rollout"], labels, data=data, sample_offset=self._offset)
        samples = self._negatives(path, labels, keys)
        learning = self._learning, self.energy_optimizer, self._energy_loss, self._failures["energy"]
        metrics = energy_step(*learning, data, samples, labels)
        metrics["value_loss"] = self._value_steps(path, labels, keys)
        metrics["sampler_loss"] = self._sampler_steps(path, labels, keys, data)
        metrics["log_prob"] = path.log_prob.mean(1)
        metrics["sq_displacement"] = path.sq_displacement.mean(1)
        metrics = self.ranks.mean(metrics)
        moved = metrics["sq_displacement"]
        velocity_var = self.velocity_var.narrow(0, self.sampler.first, self.sampler.steps)
        moved = torch.where(moved < math.inf, moved, velocity_var)  # NaN would stay for ever
        ops.update_velocity_var_(velocity_var, moved[:, None], self.settings.velocity_decay)
        if len(self.sampler.lengths) > 1:
            metrics |= {name: metrics[name].mean() for name in ("log_prob", "sq_displacement", "value_loss")}
        if self.settings.tau_rate:
            metrics |= self.temperature.update(data, path.samples[-1])
        self._average(*map(sharding.local, self._averages), None)
        return metrics | {
            "std": self.sampler.log_std.detach().exp(),
            "velocity_var": self.velocity_var.clone(),
            **{f"{name}_failures": count.clone() for name, count in self._failures.items()},
        }

    def _negatives(self, path: Trajectory, labels: Tensor | None, keys: dict[str, Tensor]) -> Tensor:
        """What the energy is raised at: the sampler's samples, or Langevin chains that start there."""
        samples = path.samples[-1]
        if self.settings.negatives == "sampler":
            return samples
        offset = self._offset
        return self._langevin(self.networks, samples, keys["refine"], labels, sample_offset=offset).samples

    def _value_steps(self, path: Trajectory, labels: Tensor | None, keys: dict[str, Tensor]) -> Tensor:
        """Temporal differences: each step learns from the value just updated."""
        losses = []
        for timestep, step in self._td_steps(path, keys):
            _, following, sq_displacement = step
            with torch.no_grad():
                if self.settings.td_redraw:
                    following, _, sq_displacement = self.sampler(
                        step.sample, timestep, keys["td_redraw"], labels, sample_offset=self._offset
                    )
                next_value = self.networks.value_at(following, self.sampler.after(timestep), labels)
            tables = self.sampler.log_std, self.velocity_var, self.time_cost
            taus, skipped = self._taus("value"), self.settings.skip_last
            if self.settings.tau_rate:
                next_value = next_value + self._cost("value", sq_displacement, timestep).detach()
                taus = (0.0, 0.0)
            target = ops.td_target(next_value, sq_displacement, timestep, *tables, *taus, skip_last=skipped)
            value = conditioned(self._learning.value, step.sample, timestep, labels)
            loss = nn.functional.mse_loss(value, target)
            self.value_optimizer.descend(self.settings.td_weight * loss, self._failures["value"])
            losses.append(loss.detach())
        return torch.stack(losses[::-1])  # of step t, in backward order

    def _td_steps(self, path: Trajectory, keys: dict[str, Tensor]) -> Iterator[tuple[Tensor, Transition]]:
        """The timesteps [B] and transitions that the value learns from, in turn; each of the path once."""
        steps, n = path.sq_displacement.shape
        if self.settings.td_order == "backward":
            for step in reversed(range(steps)):
                yield self.sampler.timestep(step, n), path.step(step)
        else:
            first = noise.randint(steps, n, keys["td_choice"], sample_offset=self._offset)
            for i in range(steps):
                t = (first + i) % steps
                yield self.sampler.first + t, path.at(t)

    def _sampler_steps(
        self, path: Trajectory, labels: Tensor | None, keys: dict[str, Tensor], data: Tensor
    ) -> Tensor:
        """Improves single steps at random places of the path, no gradient crossing steps; or whole paths."""
        steps, n = path.sq_displacement.shape
        # Where each particle's steps start.
        first = noise.randint(steps, n, keys["choice"], sample_offset=self._offset)
        losses = []
        with frozen(self.value, self.networks.energy_network):
            if self.settings.sampler_update == "policy_gradient":
                advantage = self._advantages(path, labels)
            for i in range(self.settings.sampler_steps):
                t, key = (first + i) % steps, keys[f"redraw{i}"]
                timestep = self.sampler.first + t
                if self.settings.sampler_update == "dxdp":
                    loss = self._dxdp_loss(path.at(t), timestep, labels, key)
                elif self.settings.sampler_update == "policy_gradient":
                    mine = advantage.gather(0, t[None])[0]
                    loss = self._policy_gradient_loss(path.at(t), timestep, labels, mine)
                else:
                    loss = self._backprop_loss(data, labels, key)
                self.sampler_optimizer.descend(loss, self._failures["sampler"])
                losses.append(loss.detach())
        return torch.stack(losses)

    def _dxdp_loss(self, step: Transition, timestep: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        """The value of a redrawn step and its cost; the gradient goes through the step (DxMI, sec. 2)."""
        redrawn = self._learning_sampler(step.sample, timestep, key, labels, sample_offset=self._offset)
        value = self.networks.value_at(redrawn.next_sample, self.sampler.after(timestep), labels)
        return (value + self._cost("sampler", redrawn.sq_displacement, timestep)).mean()

    def _policy_gradient_loss(
        self, step: Transition, timestep: Tensor, labels: Tensor | None, advantage: Tensor
    ) -> Tensor:
        """The score of the step taken, weighted by what it led to (GCD, arXiv 2312.03397)."""
        log_prob = self._learning_sampler(step.sample, step.next_sample, timestep, labels)
        # The entropy bound depends on sigma itself, not only through where the step led.
        cost = self._cost("sampler", step.sq_displacement, timestep)
        return (advantage * self._dim * log_prob + cost).mean()

    def _backprop_loss(self, data: Tensor, labels: Tensor | None, key: Tensor) -> Tensor:
        """The energy at the end of new paths and all their costs; the gradient goes through every step, so
        that memory grows with T: what dynamic programming is there to avoid (DxMI, sec. 3)."""
        n, offset = len(data), self._offset
        sample = self.sampler.initial(n, key, data=data, sample_offset=offset)
        costs: list[Tensor] = []
        for t in range(self.sampler.steps):
            timestep = self.sampler.timestep(t, n)
            step = self._learning_sampler(sample, timestep, key, labels, sample_offset=offset)
            costs.append(self._cost("sampler", step.sq_displacement, timestep))
            sample = step.next_sample
        return (self.networks.energy(sample, labels) + torch.stack(costs).sum(0)).mean()

    @torch.no_grad()
    def _advantages(self, path: Trajectory, labels: Tensor | None) -> Tensor:
        """[T, B]: the energy that each particle reached and the costs from step t on, less V^t(x_t)."""
        steps, n = path.sq_displacement.shape
        timesteps = [self.sampler.timestep(t, n) for t in range(steps)]
        values = [self.networks.value_at(path.samples[t], timesteps[t], labels) for t in range(steps)]
        costs = [self._cost("sampler", path.sq_displacement[t], timesteps[t]) for t in range(steps)]
        remaining = torch.stack(costs).flip(0).cumsum(0).flip(0)
        return self.networks.energy(path.samples[-1], labels) + remaining - torch.stack(values)

    def _cost(self, loss: str, sq_displacement: Tensor, timestep: Tensor) -> Tensor:
        """Entropy and running cost of steps [N] in a loss."""
        tables, skipped = (self.sampler.log_std, self.velocity_var), self.settings.skip_last
        cost = ops.running_cost(sq_displacement, timestep, *tables, *self._taus(loss), skip_last=skipped)
        return cost * self.temperature.factor if self.settings.tau_rate else cost

    def _taus(self, loss: str) -> tuple[float, float]:
        """The temperatures of entropy and running cost in a loss."""
        s = self.settings
        if s.costs_in not in ("both", loss):
            return 0.0, 0.0
        dim = self._dim if s.cost_reduction == "sum" else 1
        entropy = s.tau if s.tau_entropy is None else s.tau_entropy
        velocity = s.tau if s.tau_velocity is None else s.tau_velocity
        return entropy * dim, velocity * dim

    def _optimizers(self) -> dict[str, Adam]:
        optimizers = {"sampler": self.sampler_optimizer, "value": self.value_optimizer}
        if self.energy_optimizer is not self.value_optimizer:
            optimizers["energy"] = self.energy_optimizer
        return optimizers

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs; noise keys follow from the iteration."""
        return {
            "iteration": self.iteration,
            "networks": self.networks.state_dict(),
            "averaged": self.averaged.state_dict(),
            "velocity_var": self.velocity_var,
            **({"temperature": self.temperature.factor} if self.settings.tau_rate else {}),
            "failures": self._failures,
            **{f"{name}_optimizer": each.state_dict() for name, each in self._optimizers().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        sharding.load_(self.networks, state["networks"])
        sharding.load_(self.averaged, state["averaged"])
        self.velocity_var.copy_(sharding.like(state["velocity_var"], self.velocity_var))
        if self.settings.tau_rate:
            self.temperature.factor.copy_(sharding.like(state["temperature"], self.temperature.factor))
        for name, count in self._failures.items():
            count.copy_(sharding.like(state["failures"][name], count))
        for name, optimizer in self._optimizers().items():
            optimizer.load_state_dict(state[f"{name}_optimizer"])
        if isinstance(self._iterate, Graphed):
            self._iterate.forget()  # the optimizers' moments are other tensors now
