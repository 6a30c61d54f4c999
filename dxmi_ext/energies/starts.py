"""Training of a chain's start, the same for both samplers.

Imports torch, the engine and the task's chains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dxmi_ext.energies.chains import Chain
from dxmi_ext.engine.learning.learner import Learner
from dxmi_ext.method.networks import frozen
from dxmi_ext.method.stepper import Batch, Metrics


def descend(
    learner: Learner,
    chain: Chain,
    network: nn.Module,
    value: Callable[[Tensor, Tensor], Tensor],
    batch: Batch,
) -> Metrics:
    """A step on mean V^0(x_0) - w sum over dimensions of log sigma, w the temperature.

    Args:
        learner: learner of the chain's start.
        network: network of V^t, whose weights are frozen.
        value: V^t, (x [N, D], timestep [N]) -> [N].

    Returns:
        Metrics to log: start_std, the mean sigma.
    """
    like = torch.zeros((), device=batch.data.device).expand(batch.n, chain.dim)
    timestep = torch.zeros(batch.n, dtype=torch.int64, device=like.device)
    with frozen(network):
        x = learner.network(like, batch.keys["rollout"], sample_offset=batch.offset)
        entropy = chain.temperature * chain.start.log_stds(chain.dim)
        learner.descend("start", value(x, timestep).mean() - entropy)
    return {"start_std": chain.start.log_std.detach().exp().mean()}
