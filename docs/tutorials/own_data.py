# %% [markdown]
# # DxMI on your own data and networks
#
# Points in three dimensions, networks of your own, and the whole method: denoising pretraining, DxMI, a
# sampler in five steps, an energy, and saved networks. Replace the data and the two networks with yours.

# %%
import os

import torch
from torch import Tensor, nn

import dxmi_ext
from dxmi_ext import DxMISettings, DxMITrainer, GaussianSampler, Networks, Pretrainer, noise_key, schedules

short = bool(os.environ.get("DXMI_SHORT"))
torch.manual_seed(0)
torch.set_num_threads(1)  # more threads do not speed up small networks
steps = 5

# %% [markdown]
# ## Data
#
# Any float32 tensor `[N, *]`; here points on a helix, with a little noise. `torch.from_numpy(array).float()`
# converts a numpy array. Values of about unit size suit the default settings.

# %%
angle = 4 * torch.pi * torch.rand(20_000)
helix = torch.stack([angle.cos(), angle.sin(), angle / (2 * torch.pi) - 1], dim=1)
data = helix + 0.05 * torch.randn_like(helix)

# %% [markdown]
# ## Networks
#
# The sampler's network maps `(x [N, *], timestep int64 [N])` to `[N, *]`. The value maps the same to `[N]`,
# for timesteps 0 to T; the last one is the energy. The noise levels of the schedule fall from `sigma_max`,
# where noise hides the data, to `sigma_min`, where it hides only fine detail. To train on a GPU, move the
# networks there before you make a trainer, and draw samples with `noise_key(0, device="cuda")`; `fit` moves
# the batches.


# %%
class Net(nn.Module):
    def __init__(self, out: int) -> None:
        super().__init__()
        self.first, self.step = nn.Linear(3, 128), nn.Embedding(steps + 1, 128)
        layers = (nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU())
        self.rest = nn.Sequential(*layers, nn.Linear(128, out))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.rest(self.first(x) + self.step(timestep))


class Value(Net):
    def __init__(self) -> None:
        super().__init__(1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x, timestep)[:, 0]


schedule = schedules.variance_exploding(steps, sigma_max=2.0, sigma_min=0.1)
networks = Networks(GaussianSampler(Net(3), schedule, data_shape=(3,)), Value())

# %% [markdown]
# ## Training
#
# `fit` trains in a folder, with a progress bar, logs and checkpoints, as `dxmi train` does. A stopped script
# resumes from its last checkpoint when it is started again, and skips what is finished. `shuffled` draws the
# batches; a function of the iteration or a DataLoader works too.

# %%
pretrainer = Pretrainer(
    networks.sampler.network,
    dxmi_ext.uniform_levels(schedule.signal, schedule.noise),
    lr=2e-3,
    iterations=20 if short else 1000,
    seed=0,
)
dxmi_ext.fit(pretrainer, dxmi_ext.shuffled(data, 256), output="runs/helix/pretrain")


def distance(points: Tensor) -> Tensor:
    """Distance of points [N, 3] to the helix, [N]."""
    return torch.cdist(points, helix[:5000]).amin(dim=1)


before = networks.sampler.sample(2000, noise_key(0))
trainer = DxMITrainer(networks, DxMISettings(tau=0.03), iterations=20 if short else 3000, seed=0)
dxmi_ext.fit(trainer, dxmi_ext.shuffled(data, 256), output="runs/helix/dxmi")

# %% [markdown]
# The averaged networks are the ones to use. `save` writes safetensors, and `load` fills networks of the same
# architecture or says what does not fit; it also takes the folder of a finished `fit`. `dxmi report
# runs/helix/dxmi` writes the learning curves and settings as one page. Other commands, such as `dxmi
# sample`, build the networks themselves, so they require a task ([a new task](new_task.md)).

# %%
trained = trainer.averaged
dxmi_ext.save("runs/helix/networks", trained, data="helix")
dxmi_ext.load("runs/helix/networks", networks)

# %% [markdown]
# ## The result
#
# Distances of samples to the helix, before and after DxMI, and of the data; and how often the energy of a
# data point is below that of a point drawn uniformly from the cube around the data.

# %%
samples = trained.sampler.sample(2000, noise_key(0))
for name, points in {"pretrained": before, "DxMI": samples, "data": data[:2000]}.items():
    print(f"{name:10} mean distance {distance(points).mean():.3f}")
uniform = 3 * torch.rand(2000, 3) - 1.5
with torch.no_grad():
    lower = trained.energy(data[:2000])[:, None] < trained.energy(uniform)
print(f"AUROC of the energy, data against uniform points: {lower.float().mean():.3f}")

# %%
from matplotlib.figure import Figure

figure = Figure(figsize=(9, 3.2), layout="constrained")
for i, (name, points) in enumerate({"data": data, "pretrained": before, "DxMI": samples}.items()):
    axes = figure.add_subplot(1, 3, i + 1, projection="3d", title=name)
    axes.scatter(*points[:2000].T, s=1)
    axes.set(xlim=(-1.5, 1.5), ylim=(-1.5, 1.5), zlim=(-1.5, 1.5))
figure.savefig("runs/helix/helix.png", dpi=80)

# %% [markdown]
# A run printed
#
#     pretrained mean distance 0.297
#     DxMI       mean distance 0.068
#     data       mean distance 0.062
#     AUROC of the energy, data against uniform points: 0.964
#
# ![Data, samples of the pretrained sampler, and samples after DxMI](own_data.png)
