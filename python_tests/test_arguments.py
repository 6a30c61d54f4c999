"""An error names the wrong argument of a public function, without torch's traceback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dxmi_ext
from dxmi_ext import DxMISettings, DxMITrainer, GaussianSampler, Networks, Pretrainer

DATA = torch.arange(60.0).view(20, 3) / 30 - 1
SCHEDULE = dxmi_ext.schedules.variance_exploding(4, sigma_max=1.0, sigma_min=0.1)
KEY = dxmi_ext.noise_key(0)


class Net(nn.Linear):
    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return super().forward(x)


def sampler() -> GaussianSampler:
    return GaussianSampler(Net(3, 3), SCHEDULE, (3,))


def trainer(seed: int = 0, **settings: Any) -> DxMITrainer:
    return DxMITrainer(Networks(sampler(), Net(3, 1)), DxMISettings(**settings), iterations=3, seed=seed)


def trainer_with(**options: Any) -> DxMITrainer:
    networks = Networks(sampler(), Net(3, 1))
    return DxMITrainer(networks, DxMISettings(), iterations=3, seed=0, **options)


def pretrainer(levels: Any = None, **options: Any) -> Pretrainer:
    levels = dxmi_ext.uniform_levels(SCHEDULE.signal, SCHEDULE.noise) if levels is None else levels
    return Pretrainer(Net(3, 3), levels, **({"lr": 1e-2, "iterations": 3, "seed": 0} | options))


def fit(given: Any = None, **options: Any) -> Any:
    batches = dxmi_ext.shuffled(DATA, 8)
    return dxmi_ext.fit(given or trainer(), batches, **({"output": "run"} | options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DxMISettings(tau="0.1"), "tau must be a number, got '0.1'"),
        (lambda: DxMISettings(td_redraw=1), "td_redraw must be true or false, got 1"),
        (lambda: trainer(seed=-1), "seed must be an integer from 0 to"),
        (lambda: trainer(seed=True), "seed must be an integer from 0 to .*, got True"),
        (lambda: trainer_with(ranks=2), "ranks must be Ranks, got int"),
        (lambda: trainer_with(langevin={"langevin_steps": 3}), "langevin must be LangevinSettings, got dict"),
        (lambda: trainer_with(execution="compile"), "execution must be ExecutionSettings, got str"),
        (lambda: trainer(skip_last=5), "skip_last must be <= T = 4, got 5"),
        (lambda: pretrainer(iterations=2.5), "iterations must be an integer >= 0, got 2.5"),
        (lambda: pretrainer(prediction="noise"), "prediction must be one of eps, v, x, edm, got 'noise'"),
        (lambda: pretrainer(lr=-1.0), "lr must be >= 0, got -1.0"),
        (lambda: pretrainer(ema_decay=1.5), "ema_decay must be < 1, got 1.5"),
        (lambda: pretrainer(clip=-1.0), "clip must be >= 0, got -1.0"),
        (lambda: pretrainer(warmup=-1), "warmup must be >= 0, got -1"),
        (lambda: pretrainer(sigma_data=0.0), "sigma_data must be > 0, got 0.0"),
        (lambda: pretrainer(SCHEDULE), r"draw_levels must be a function, .* got Schedule"),
        (lambda: dxmi_ext.uniform_levels(torch.ones(3), torch.ones(4)), r"got \[3\], \[4\]"),
        (lambda: dxmi_ext.uniform_levels([1.0], [0.5]), "signal must be a tensor, got list"),
        (lambda: dxmi_ext.uniform_levels(torch.ones(1), [0.5]), "noise must be a tensor, got list"),
        (lambda: dxmi_ext.shuffled([1.0], 8), "data must be a tensor, got list"),
        (lambda: dxmi_ext.shuffled(torch.tensor(1.0), 8), r"data must have shape \[N, \*\], .* got \[\]"),
        (lambda: dxmi_ext.shuffled(DATA, 8.0), "batch_size must be an integer >= 1, got 8.0"),
        (lambda: GaussianSampler(Net(3, 3), SCHEDULE, 3), "data_shape must be a sequence .* got int"),
        (lambda: GaussianSampler(Net(3, 3), SCHEDULE, None), "data_shape must be a sequence .* got NoneType"),
        (lambda: GaussianSampler(Net(3, 3), SCHEDULE, (0,)), "of data_shape must be >= 1, got 0"),
        (lambda: GaussianSampler(SCHEDULE, Net(3, 3), (3,)), r"network must be .*Module, got Schedule"),
        (lambda: GaussianSampler(Net(3, 3), torch.ones(4), (3,)), "schedule must be a Schedule .*Tensor"),
        (lambda: Networks(Net(3, 3), Net(3, 1)), "sampler must be a GaussianSampler, got Net"),
        (lambda: Networks(sampler(), lambda x, t: x), r"value must be .*Module, got function"),
        (lambda: Networks(sampler(), Net(3, 1), Net), r"energy must be .*, got the class Net"),
        (lambda: sampler().sample(2.0, KEY), "n must be an integer >= 0, got 2.0"),
        (lambda: sampler().sample(2, KEY, [0, 1]), "labels must be a tensor or None, got list"),
        (lambda: sampler().sample(2, KEY, torch.zeros(3)), r"labels must have shape \[2\], got \[3\]"),
        (lambda: sampler().sample(2, KEY, data=torch.zeros(4, 3)), r"data must have shape \[2, 3\], got"),
        (lambda: sampler().rollout(2, KEY, torch.zeros(1)), r"labels must have shape \[2\], got \[1\]"),
        (lambda: fit(Networks(sampler(), Net(3, 1))), "trainer must be .*, got Networks"),
        (lambda: fit(output=None), "output must be a str or PathLike, got NoneType"),
        (lambda: fit(resume=None), "resume must be a str or PathLike, got NoneType"),
        (lambda: fit(picture="a.png"), "picture must be a function of a file, got str"),
        (lambda: dxmi_ext.save("saved", Net(3, 1).state_dict()), r"networks must .*, got OrderedDict"),
        (lambda: dxmi_ext.save("saved", Net(3, 1), when=object()), "about must be serializable as json"),
        (lambda: dxmi_ext.load("saved", Net), "networks must be a torch.nn.Module, got the class Net"),
        (lambda: dxmi_ext.load(Net(3, 1), "saved"), "path must be a str or PathLike, got Net"),
    ],
)
def test_a_wrong_argument_is_named(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


def test_a_sampler_or_value_without_weights() -> None:
    frozen = sampler().requires_grad_(False)
    with pytest.raises(dxmi_ext.ConfigError, match="sampler must have weights to train, got GaussianSampler"):
        DxMITrainer(Networks(frozen, Net(3, 1)), DxMISettings(), iterations=3, seed=0)
    for value in (nn.Identity(), Net(3, 1).requires_grad_(False)):
        message = f"value must have weights to train, got {type(value).__name__} without any"
        with pytest.raises(dxmi_ext.ConfigError, match=message):
            DxMITrainer(Networks(sampler(), value), DxMISettings(), iterations=3, seed=0)


def test_weights_of_low_precision() -> None:
    networks = Networks(sampler(), Net(3, 1)).bfloat16()
    with pytest.raises(dxmi_ext.ConfigError, match=r"float32 or float64 weights, got torch\.bfloat16"):
        DxMITrainer(networks, DxMISettings(), iterations=3, seed=0)
