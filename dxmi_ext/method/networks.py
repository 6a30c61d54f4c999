"""The networks that DxMI trains jointly. Imports torch and ``dxmi_ext.method.sampler``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dxmi_ext.engine.arguments import of_type
from dxmi_ext.engine.compute import execution
from dxmi_ext.engine.compute.calls import call
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.method.sampler import GaussianSampler, Guide, per_row


class Networks(nn.Module):
    """The networks that DxMI trains jointly, averages, checkpoints and exports.

    Networks take labels [N] as last argument if the data have them.

    Args:
        sampler: sampler pi.
        value: V^t, (x [N, *], timestep int64 [N]) -> [N]; t = 0..T, or 0..T - 1 with a separate energy. T is
            the sampler's `end`.
        energy: E = V^T, (x [N, *]) -> [N]; None: V^T of the value.

    Raises:
        TypeError: an argument is of another type.
    """

    def __init__(self, sampler: GaussianSampler, value: nn.Module, energy: nn.Module | None = None) -> None:
        super().__init__()
        of_type("sampler", sampler, GaussianSampler, "a GaussianSampler")
        of_type("value", value, nn.Module, "a torch.nn.Module")
        of_type("energy", energy, (nn.Module, type(None)), "a torch.nn.Module or None")
        self.sampler, self.value, self.energy_network = sampler, value, energy

    def shard_(self, ranks: Ranks) -> None:
        """Shards the weights of each network over the ranks, in place, if ``ranks.shard``."""
        for network in (self.sampler.network, self.value, self.energy_network):
            if network is not None:
                ranks.shard_(network)

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """E(x), [N]; low where data are likely."""
        if self.energy_network is not None:
            return call(self.energy_network, x, labels)
        last = torch.full((len(x),), self.sampler.end, device=x.device)
        return call(self.value, x, last, labels)

    def value_at(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        """V^t(x), [N], for t = 0..T; V^T is the energy."""
        if self.energy_network is None:
            return call(self.value, x, timestep, labels)
        last = self.sampler.end
        values = call(self.value, x, timestep.clamp(max=last - 1), labels)
        return torch.where(timestep == last, self.energy(x, labels), values)

    def guide(self, guidance: float) -> Guide:
        """Value guidance for `GaussianSampler.sample`: x - guidance sigma_t grad V^{t+1}(x), after step t."""

        def move(x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
            with torch.inference_mode(False), torch.enable_grad(), frozen(self):
                # Copies, because autograd takes no tensors of inference mode.
                x, reached = x.detach().clone().requires_grad_(), self.sampler.after(timestep.clone())
                classes = None if labels is None else labels.clone()
                (slope,) = torch.autograd.grad(self.value_at(x, reached, classes).sum(), x)
            std = self.sampler.log_std.detach().exp()[timestep]
            return (x - guidance * per_row(std, x) * slope).detach()

        return move


def prepare(settings: ExecutionSettings, networks: Networks) -> None:
    """Applies `execution.prepare` to all networks, and the memory format to the samples."""
    sampler = networks.sampler
    parts = sampler.network, networks.value, networks.energy_network
    sampler.memory_format = execution.prepare(settings, *parts, data_shape=sampler.data_shape)


class TimeIndependent(nn.Module):
    """An energy as a time-independent value: V^t = E (DxMI, Alg. 2)."""

    def __init__(self, energy: nn.Module) -> None:
        super().__init__()
        self.energy = energy

    def forward(self, x: Tensor, timestep: Tensor, *labels: Tensor) -> Tensor:
        return self.energy(x, *labels)


@contextmanager
def frozen(*modules: nn.Module | None) -> Iterator[None]:
    """Within, the modules' weights are frozen; gradients still flow to their inputs."""
    weights = [p for m in modules if m is not None for p in m.parameters() if p.requires_grad]
    for p in weights:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in weights:
            p.requires_grad_(True)
