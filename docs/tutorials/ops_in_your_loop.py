# %% [markdown]
# # The ops in a loop of your own
#
# `dxmi_ext.ops` has the arithmetic of DxMI that is not a network, as fused torch ops with gradients. It
# requires torch and numpy only. This tutorial writes DxMI's sampler and value updates as a plain loop: a
# sampler learns to draw from a known energy, that of a Gaussian, in four steps.

# %%
import os

import torch
from torch import Tensor, nn

from dxmi_ext import ops, schedules

iterations = 40 if os.environ.get("DXMI_SHORT") else 800
torch.manual_seed(0)
torch.set_num_threads(1)  # more threads do not speed up small networks
steps, batch_size = 4, 256
tau = 2.0  # costs are means over the two dimensions: with tau = 2 the sampler draws from exp(-E)
center, spread = torch.tensor([1.0, -1.0]), 0.5


def energy(x: Tensor) -> Tensor:
    """[N, 2] -> [N]"""
    return ((x - center) / spread).square().sum(dim=1) / 2


# %% [markdown]
# ## Networks and tables
#
# The step of a sampler is `sample_coef[t] x + output_coef[t] network(x, t) + exp(log_std[t]) z`. A schedule
# provides these tables; `log_std` is trained. The entropy and the running cost, weighted by tau, keep the
# samples from collapsing; `velocity_var` is the scale of the running cost, and follows the steps. `min_std`
# is about the spread of the target: the last step, which sees the energy itself, must be free to move.


# %%
class Net(nn.Module):
    """(x [N, 2], timestep [N]) -> [N, out]"""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.step = nn.Embedding(steps + 1, 64)
        self.first = nn.Linear(2, 64)
        self.rest = nn.Sequential(nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, out))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.rest(self.first(x) + self.step(timestep))


schedule = schedules.variance_exploding(steps, sigma_max=2.0, sigma_min=0.3, min_std=0.3)
sample_coef, output_coef = schedule.sample_coef.float(), schedule.output_coef.float()
log_std = nn.Parameter(schedule.log_std.float())
velocity_var = (2 * log_std.detach()).exp()
time_cost = torch.zeros(steps)
net, value = Net(2), Net(1)
for network in (net, value):  # so that the sampler starts as a random walk
    nn.init.zeros_(network.rest[-1].weight)
    nn.init.zeros_(network.rest[-1].bias)
optimizer = torch.optim.Adam([*net.parameters(), log_std], 1e-3)
value_optimizer = torch.optim.Adam(value.parameters(), 2e-3)

# %% [markdown]
# ## Noise by key
#
# Noise is a function of `(key, step, row, element)` and takes no generator: the same key gives the same
# bits on every processor and however the batch is split. `next_key` gives the key of the next draw.


# %%
def step(x: Tensor, t: Tensor, key: Tensor) -> ops.StepOutput:
    return ops.sampler_step(x, net(x, t), t, sample_coef, output_coef, log_std, key)


@torch.no_grad()
def rollout(n: int, key: Tensor) -> tuple[Tensor, Tensor]:
    """x_0 .. x_T, [T + 1, n, 2], and the squared displacement of each step, [T, n]."""
    path, sq_displacement = [schedule.initial_std * ops.normal((n, 2), key)], []
    for t in range(steps):
        taken = step(path[-1], torch.full((n,), t), key)
        path.append(taken.next_sample)
        sq_displacement.append(taken.sq_displacement)
    return torch.stack(path), torch.stack(sq_displacement)


def next_value(x: Tensor, t: Tensor) -> Tensor:
    """V^t(x), whose last is the energy."""
    return torch.where(t == steps, energy(x), value(x, t)[:, 0])


# %% [markdown]
# ## The loop
#
# The value learns by temporal differences: its target is the next value plus the cost of the step. The
# sampler then minimizes the same sum on single steps, so nothing is propagated through the path.

# %%
key = ops.noise_key(seed=0)
for _ in range(iterations):
    path, sq_displacement = rollout(batch_size, key)
    ops.update_velocity_var_(velocity_var, sq_displacement, decay=0.99)
    key = ops.next_key(key)

    t = torch.randint(0, steps, (batch_size,))
    x = path[t, torch.arange(batch_size)]
    with torch.no_grad():
        taken = step(x, t, key)
        after = next_value(taken.next_sample, t + 1)
        target = ops.td_target(after, taken.sq_displacement, t, log_std, velocity_var, time_cost, tau, tau)
    value_loss = nn.functional.mse_loss(value(x, t)[:, 0], target)
    value_optimizer.zero_grad()
    value_loss.backward()
    value_optimizer.step()

    taken = step(x, t, key)  # the same noise, this time with gradients
    cost = ops.running_cost(taken.sq_displacement, t, log_std, velocity_var, tau, tau)
    loss = (next_value(taken.next_sample, t + 1) + cost).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    key = ops.next_key(key)

# %% [markdown]
# ## The result
#
# Mean and standard deviation of the samples, compared with the true ones.

# %%
path, _ = rollout(10_000, ops.noise_key(1))
mean, std = path[-1].mean(dim=0), path[-1].std(dim=0)
print(f"mean {mean[0]:.2f} {mean[1]:.2f}; true {center[0]:.2f} {center[1]:.2f}")
print(f"standard deviation {std[0]:.2f} {std[1]:.2f}; true {spread:.2f} {spread:.2f}")

# %% [markdown]
# A run printed
#
#     mean 0.95 -0.99; true 1.00 -1.00
#     standard deviation 0.53 0.51; true 0.50 0.50
