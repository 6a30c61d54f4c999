"""The baseline that DxMI replaces: an energy alone, by contrastive divergence with Langevin negatives.

Imports torch, the engine and the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dxmi_ext.engine import settings
from dxmi_ext.engine.compute.execution import ExecutionSettings, check_graph
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Average, Learner
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import noise, symptoms
from dxmi_ext.method.energy_step import energy_step
from dxmi_ext.method.langevin import Chains, Langevin, LangevinSettings, Pool
from dxmi_ext.method.losses import energy_loss
from dxmi_ext.method.networks import Networks, prepare
from dxmi_ext.method.settings import CHAIN_RULES, RULES, DxMISettings
from dxmi_ext.method.stepper import Batch, Metrics, Stepper


class LangevinTrainer(Stepper):
    """Trains the energy of DxMI's networks by the same loss, optimizer and average, without the sampler.

    Args:
        networks: networks whose energy is trained; the sampler only provides the noise x_0.
        algorithm: settings; ``negatives`` is short_run or persistent, and the settings of sampler and value
            have no effect.
        iterations: length of the run, over which the learning rate decays.
        seed: seed of every random choice; each is keyed by the global row, whatever the split of the batch.
        ranks: ranks that share the rows of a batch.
        langevin: settings of the chains.
        execution: precision and compilation of the networks.

    Attributes:
        averaged: the networks with averaged weights, for evaluation.

    Raises:
        ConfigError: the settings ask for a sampler, for sharded weights, or for a CUDA graph that is not
            supported.
    """

    stream = "langevin"

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
        ranks, execution = ranks or Ranks(), execution or ExecutionSettings()
        langevin = langevin or LangevinSettings()
        _check(networks, algorithm, langevin, execution, ranks)
        self.networks, self.algorithm, self.langevin = networks, algorithm, langevin
        self.iterations = iterations
        prepare(execution, networks)
        ranks.equalize_(networks)
        self.average = Average(networks, algorithm.ema_decay)
        self.averaged = self.average.module
        self._make_learner(iterations, ranks)
        self._langevin = Langevin.of(langevin, algorithm.tau)
        self._energy_loss = energy_loss(algorithm)
        super().__init__(
            seed=seed,
            device=networks.sampler.log_std.device,
            ranks=ranks,
            execution=execution,
            uses=("chain", "pick", "restart"),
            graphed=execution.cuda_graph,
        )
        self.pool: Pool | None = None
        if algorithm.negatives == "persistent":
            none = networks.sampler.log_std.detach().new_empty(0, *networks.sampler.data_shape)
            like = networks.sampler.initial(0, self._draws.at(0)["chain"], data=none)
            self.pool = Pool(langevin.langevin_pool, like)

    def _make_learner(self, iterations: int, ranks: Ranks) -> None:
        s, sampler, value = self.algorithm, self.networks.sampler, self.networks.value
        energy = self.networks.energy_network
        network, lr, clip = value, s.value_lr, s.value_clip
        if energy is not None:
            network, lr, clip = energy, s.energy_lr, s.energy_clip
        self.learner = Learner(
            network,
            lr,
            s.lr_decay,
            iterations,
            ranks,
            clip=clip,
            betas=s.adam_betas,
            losses=("energy",),
        )
        self.learners = [self.learner]
        # The energy as wrapped for training.
        learning = self.learner.network
        if energy is None:
            self._learning = Networks(sampler, learning)
        else:
            self._learning = Networks(sampler, value, learning)

    def iterate(self, batch: Batch) -> Metrics:
        """Chains, then an energy step.

        Returns:
            The metrics of an energy step, ``sq_gradient`` and ``sq_sample`` (means over rows and D of the
            squared gradients along the chains and of the squared samples), and ``diverged``, the share of
            chains that did.
        """
        chains, labels = self._negatives(batch)
        metrics = energy_step(self.learner, self._learning, self._energy_loss, batch, chains.samples, labels)
        metrics["sq_gradient"] = chains.sq_gradient.mean()
        metrics["sq_sample"] = chains.samples.square().mean()
        metrics["diverged"] = chains.diverged.to(chains.samples.dtype).mean()
        self.average.update()
        return self.ranks.mean(metrics)

    def _negatives(self, batch: Batch) -> tuple[Chains, Tensor | None]:
        """This rank's chains and their labels."""
        n, offset, labels = batch.n, batch.offset, batch.labels
        sampler, key = self.networks.sampler, batch.keys["chain"]
        start = fresh = sampler.initial(n, key, data=batch.data, sample_offset=offset).detach()
        if self.pool is not None:
            picked = self.pool.pick(n * self.ranks.world_size, batch.keys["pick"])
            uniform = noise.uniform((n,), batch.keys["restart"], sample_offset=offset)
            restart = uniform < self.langevin.langevin_restart
            start, labels = self.pool.resume(picked[offset : offset + n], fresh, labels, restart)
        chains = self._langevin(self.networks, start, key, labels, restart=fresh, sample_offset=offset)
        if self.pool is not None:
            everyone = None if labels is None else self.ranks.gather(labels)
            self.pool.keep(picked, self.ranks.gather(chains.samples), everyone)
        return chains, labels

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return symptoms.of(numbers, ())

    def parts(self) -> dict[str, Any]:
        return {
            "networks": self.networks,
            "averaged": self.averaged,
            "optimizer": self.learner.optimizer,
            "failures": self.learner.failures["energy"],
            **({} if self.pool is None else {"pool": self.pool}),
        }


def _check(
    networks: Networks,
    algorithm: DxMISettings,
    langevin: LangevinSettings,
    execution: ExecutionSettings,
    ranks: Ranks,
) -> None:
    settings.check((*RULES, *CHAIN_RULES), algorithm, langevin)
    check_graph(execution, networks.sampler.log_std.device, ranks)
    if algorithm.trains_sampler:
        raise ConfigError(f"negatives must be short_run or persistent, got {algorithm.negatives}")
    if ranks.shard and not ranks.alone:
        raise ConfigError(f"shard must be false with negatives={algorithm.negatives}, got true")
