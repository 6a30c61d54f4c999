"""The baseline that DxMI replaces: an energy alone, by contrastive divergence with Langevin negatives.

Imports torch and ``dxmi_ext`` up to ``trainer``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dxmi_ext import health, noise, speed
from dxmi_ext.config import ConfigError
from dxmi_ext.energy_step import energy_step, loss_of
from dxmi_ext.graphs import Graphed
from dxmi_ext.langevin import Langevin, Pool
from dxmi_ext.networks import Networks
from dxmi_ext.optim import Adam, LearningRates
from dxmi_ext.ranks import Ranks
from dxmi_ext.trainer import DxMISettings, check_cuda_graph


class LangevinTrainer:
    """Trains the energy of DxMI's networks by the same loss, optimizer and average, without the sampler.

    Args:
        networks: the energy learns; of the sampler, only the noise x_0 is used.
        settings: ``negatives`` is short_run or persistent; what concerns sampler and values has no effect.
        iterations: length of the run, over which the learning rate decays.
        seed: of every random choice; each is keyed by the global row, so none depends on the batch's split.
        ranks: among which the rows of a batch are split.

    Raises:
        ConfigError: the settings want a sampler trained, or a CUDA graph where there can be none.
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
        if settings.trains_sampler:
            raise ConfigError(f"negatives: got {settings.negatives!r}, wants short_run or persistent")
        self.networks, self.settings, self.ranks = networks, settings, ranks or Ranks()
        if self.ranks.shard and not self.ranks.alone:
            raise ConfigError(f"shard: got true, which negatives={settings.negatives} cannot have")
        self.iterations, self.iteration = iterations, 0
        speed.prepare(settings, networks.sampler, networks.value, networks.energy_network)
        self.averaged = copy.deepcopy(networks).requires_grad_(False).eval()
        self._average = get_ema_multi_avg_fn(settings.ema_decay)
        self._averages = list(self.averaged.parameters()), list(networks.parameters())
        wrap, energy = self.ranks.wrap, networks.energy_network
        if energy is None:
            self.optimizer = Adam(networks.value.parameters(), settings.value_lr, settings.value_clip)
            self._learning = Networks(networks.sampler, wrap(networks.value))
        else:
            self.optimizer = Adam(energy.parameters(), settings.energy_lr, settings.energy_clip)
            self._learning = Networks(networks.sampler, networks.value, wrap(energy))
        self._learning_rates = LearningRates([self.optimizer], settings.lr_decay, iterations)
        self._langevin = Langevin.of(settings, settings.tau)
        self._energy_loss = loss_of(settings.energy_loss, settings.gamma, settings.noise_magnitude)
        device = networks.sampler.log_std.device
        self._failures, self._seed = networks.sampler.log_std.new_zeros(()), seed
        self.retry(0, 1.0)
        self.pool: Pool | None = None
        if settings.negatives == "persistent":
            key = self._draws.at(0)["chain"]
            none = self._failures.new_empty(0, *networks.sampler.data_shape)
            self.pool = Pool(settings.langevin_pool, networks.sampler.initial(0, key, data=none))
        self._iterate: Callable[..., dict[str, Tensor]] = self._iteration_of
        check_cuda_graph(settings, device, self.ranks)
        if settings.cuda_graph:
            self._iterate = Graphed(self._iteration_of)

    def retry(self, attempt: int, lr_scale: float) -> None:
        stream = f"langevin, attempt {attempt}" if attempt else "langevin"
        uses = ["chain", "pick", "restart"]
        self._draws = noise.Draws(self._seed, stream, uses, self._failures.device)
        self._learning_rates.scale = lr_scale

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return health.symptoms(numbers, ())

    def step(self, batch: Tensor | tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """One iteration: chains, then an energy step.

        Args:
            batch: this rank's rows: data [B, *], or data and labels, int64 [B].

        Returns:
            What to log, scalars on the device: beside the loss and the mean energies, ``sq_gradient`` and
            ``sq_sample``, means over rows and D of the squared gradient along the chains and of the squared
            samples, and the share of chains that ``diverged``.
        """
        data, labels = batch if isinstance(batch, tuple) else (batch, None)
        self._learning_rates.at(self.iteration)
        with speed.running(self.settings, data.device):
            metrics = self._iterate(self._draws.keys(self.iteration), data, labels)
        self.iteration += 1
        return metrics

    def _iteration_of(self, drawn: Tensor, data: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """What the device does in an iteration, whose noise keys are `drawn`."""
        samples, sample_labels, diagnostics = self._negatives(self._draws.named(drawn), data, labels)
        steps = self._learning, self.optimizer, self._energy_loss, self._failures
        metrics = energy_step(*steps, data, samples, labels, sample_labels)
        self._average(*self._averages, None)
        return self.ranks.mean(metrics | diagnostics) | {"energy_failures": self._failures.clone()}

    def _negatives(
        self, keys: dict[str, Tensor], data: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """This rank's chains: their ends [n, *], their labels and what to log of them."""
        n = len(data)
        offset = self.ranks.rank * n
        start = fresh = self.networks.sampler.initial(
            n, keys["chain"], data=data, sample_offset=offset
        ).detach()
        if self.pool is not None:
            picked = self.pool.pick(n * self.ranks.world_size, keys["pick"])
            uniform = noise.uniform((n,), keys["restart"], sample_offset=offset)
            restart = uniform < self.settings.langevin_restart
            start, labels = self.pool.resume(picked[offset : offset + n], fresh, labels, restart)
        samples, sq_gradient, diverged = self._langevin(
            self.networks, start, keys["chain"], labels, restart=fresh, sample_offset=offset
        )
        if self.pool is not None:
            everyone = None if labels is None else self.ranks.gather(labels)
            self.pool.keep(picked, self.ranks.gather(samples), everyone)
        diagnostics = {
            "sq_gradient": sq_gradient.mean(),
            "sq_sample": samples.square().mean(),
            "diverged": diverged.to(samples.dtype).mean(),
        }
        return samples, labels, diagnostics

    def state_dict(self) -> dict[str, Any]:
        """Everything that resuming needs; noise keys follow from the iteration."""
        state = {
            "iteration": self.iteration,
            "networks": self.networks.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "failures": self._failures,
        }
        return state if self.pool is None else state | {"pool": self.pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.networks.load_state_dict(state["networks"])
        self.averaged.load_state_dict(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._failures.copy_(state["failures"])
        if self.pool is not None:
            self.pool.load_state_dict(state["pool"])
        if isinstance(self._iterate, Graphed):
            self._iterate.forget()  # the optimizers' moments are other tensors now
