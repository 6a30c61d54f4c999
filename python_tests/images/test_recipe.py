"""Image recipes: a shrunken version of each, and a tiny run from data to samples and metrics."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from dxmi_ext import cli, ops, tasks
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.output.runlog import read_metrics
from dxmi_ext.engine.runs import config, identity
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.images import chains, evaluation, model
from dxmi_ext.images import recipe as images
from dxmi_ext.images.metrics import classifier, features
from dxmi_ext.images.networks import pretrained, unet
from dxmi_ext.images.networks.pretrained import DDPM, EDM
from dxmi_ext.method import schedules
from dxmi_ext.method.sampler import Clipped, GaussianSampler, Timed

for library in ("diffusers", "yaml", "PIL"):
    pytest.importorskip(library)

RECIPES = [name for name in tasks.recipes() if tasks.task_of(tasks.find(name)) is images]
TINY = unet.Architecture(8, (1, 2), blocks=1, attention=(4,))
FEW = [
    "energy_width=4",
    "batch_size=4",
    "device=cpu",
    "precision=float32",
    "tensorboard=false",
    "features=null",
]
PLAIN = str(Path(__file__).parent / "plain.yaml")
SHORT = ["pretrain_iterations=2", "iterations=2", "checkpoint_every=1", "log_every=1", "picture_every=0"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(unet.ARCHITECTURES, "small", TINY)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "images.npz"
    rng = np.random.default_rng(0)
    split = {"x": rng.integers(0, 256, (24, 8, 8, 3), dtype=np.uint8), "y": np.arange(24) % 3}
    np.savez(path, **{f"{name}_{key}": value for name in ("train", "test") for key, value in split.items()})
    return path


def run(command: str, recipe: str, output: Path, data: Path, *settings: str) -> int:
    shared = [f"output={output}", f"data={data}", f"cache={data.parent / 'cache'}", *FEW, *SHORT]
    return cli.main([command, recipe, *shared, *settings])


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_tries_an_iteration(
    recipe: str,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = ["dry_run=true", "unet=small", "image_size=8", "steps=3", "skip_last=0", "features=classifier"]
    monkeypatch.delattr(classifier, "_trained")  # takes 1,500 iterations
    assert run("train", recipe, tmp_path / "run", data, *settings) == 0
    assert cli.main(["train", recipe, "--help"]) == 0
    shown = capsys.readouterr().out
    assert (
        f"{data} (npz): train 24 (0: 8, 1: 8, 2: 8); test 24 (0: 8, 1: 8, 2: 8)\nskipped: nothing\n" in shown
    )
    assert "tau_entropy=0." in shown and "pretrain: one iteration" in shown and "dxmi: one iteration" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["value_kind=per_step", "prediction=v", "channels_last=true"],
        ["value_kind=separate", "schedule=ddim", "conditional=true", "sampler_update=policy_gradient"],
        ["schedule=edm", "rho=4", "stochastic_last=true", "conditional=true"],
        ["schedule=edm", "patch=2", "time_scale=1000", "level_mean=-.9", "pretrain_warmup=2"],
        ["schedule=edm", "patch=2", "energy_network=encoder", "conditional=true", "value_kind=per_step"],
        ["energy_network=encoder", "energy_level=.2", "value_kind=separate"],
        ["data_noise=.05", "min_std=.05", "denoised=true"],
        ["schedule=edm", "lengths=2,3", "energy_network=encoder", "value_kind=per_step", "denoised=true"],
    ],
)
def test_a_run_from_data_to_samples(settings: list[str], data: Path, tmp_path: Path) -> None:
    """A stopped and resumed run ends with the same bytes; sampling takes classes and guidance."""
    whole, again, final = tmp_path / "whole", tmp_path / "again", "model/model.safetensors"
    settings = ["unet=small", "steps=3", *settings]
    assert run("train", PLAIN, whole, data, *settings) == 0
    assert run("pretrain", PLAIN, again, data, *settings) == 0
    assert run("train", PLAIN, again, data, *settings) == 0
    assert (again / final).read_bytes() == (whole / final).read_bytes()
    last_std = float(images.load(whole, torch.device("cpu"))[1].sampler.log_std[-1].detach().exp())
    assert last_std == pytest.approx(1e-6, rel=1e-4) or "denoised=true" not in settings
    rows = read_metrics(whole / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["pretrain", "pretrain", "dxmi", "dxmi"]
    numbers = [number for row in rows for number in row.values() if isinstance(number, float)]
    assert all(map(math.isfinite, numbers)) and (whole / "samples.png").stat().st_size
    labels = "0-2" if "conditional=true" in settings else None
    drawn, once = (
        torch.cat(
            [
                batch.samples
                for batch in images.sample(
                    whole, range(5), 0, batch_size, torch.device("cpu"), guidance=0.1, labels=labels
                )
            ]
        )
        for batch_size in (2, 5)
    )
    assert drawn.shape == (5, 3, 8, 8)
    torch.testing.assert_close(drawn, once, rtol=1e-4, atol=1e-4)


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_pretraining_alone_leaves_a_run_that_is_past_it(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(model, "save", interrupted)
        assert run("train", PLAIN, tmp_path, data) == 130
    assert run("pretrain", PLAIN, tmp_path, data) == 0
    assert "is past its pretraining" in capsys.readouterr().out and not (tmp_path / "model").exists()


def test_a_denoiser_uses_its_own_sigma_data(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("pretrain", PLAIN, tmp_path / "base", data, "schedule=edm") == 0
    settings = ["schedule=edm", f"start={tmp_path / 'base'}", "sigma_data=.7"]
    assert run("train", PLAIN, tmp_path / "run", data, *settings) == 2
    assert "sigma_data must be 0.5 as in" in capsys.readouterr().err


def test_a_start_that_ships_with_the_package(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is used if it fits the data and the pretraining; runs that ship with it omit their encoder."""

    def phases(*settings: str) -> tuple[set[str], str]:
        output = tmp_path / "-".join(["run", *settings])
        assert run("train", PLAIN, output, data, "start=tiny", *shared, *settings) == 0
        return {row["phase"] for row in read_metrics(output / "metrics.jsonl")}, capsys.readouterr().err

    shared = ["schedule=edm", "energy_network=encoder"]
    base = tmp_path / "base"
    assert run("pretrain", PLAIN, base, data, "start=none", *shared) == 0
    ships = {"tiny": base}
    monkeypatch.setattr(tasks, "shipped", lambda: ships)
    assert phases()[0] == {"dxmi"}
    found, told = phases("pretrain_lr=.1")
    assert found == {"pretrain", "dxmi"} and "tiny does not fit pretrain_lr=0.1: this run pretrains" in told
    assert "tiny does not fit images of shape [3, 4, 4]" in phases("image_size=4")[1]
    found, told = phases("start=none")
    assert found == {"pretrain", "dxmi"} and "does not fit" not in told

    whole = tmp_path / "run"
    config.save(identity.settings_of(images.Config, whole).replace(start="tiny"), whole / "config.yaml")
    _, expected, _ = model.load(whole, torch.device("cpu"))
    weights = safetensors.torch.load_file(whole / "model/model.safetensors")
    kept = {name: weight for name, weight in weights.items() if ".encoder." not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, whole / "model/model.safetensors")
    _, loaded, _ = model.load(whole, torch.device("cpu"))
    for name, weight in expected.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_a_run_of_another_task_is_no_start(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint.save_model(tmp_path / "plane/model", torch.nn.Linear(1, 1), {"task": "two_d"})
    assert run("train", PLAIN, tmp_path / "run", data, f"start={tmp_path / 'plane'}") == 2
    assert "start must be a run of the task images, got" in capsys.readouterr().err


class Means(torch.nn.Module):
    """Features: means of 4 x 4 pixels."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(x.float(), 4).flatten(1)


@pytest.mark.parametrize(
    ("train", "test", "kept", "lines"),
    [
        (1, 1, [], ["metrics of samples: will be skipped, they require >= 2 images, got 1"]),
        (3, 0, ["fd_means_3", "kd_means_3", "kd_means_3_std"], ["precision and recall: will be skipped, th",
                                                              "metrics of test images: skipped, "]),
        (5, 4, ["fd_means_5", "kd_means_5", "kd_means_5_std", "precision_means_5", "recall_means_5"],
         ["metrics of test images: skipped, got 4 test images, fewer than the 5 samples"]),
    ],
)  # fmt: skip
def test_few_images_end_no_run(
    train: int,
    test: int,
    kept: list[str],
    lines: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Notes before the first iteration name the metrics that will be skipped; all others are computed."""
    monkeypatch.setattr(features, "load", lambda _: features.Extractor(Means(), "means"))
    monkeypatch.setattr(evaluation.plots, "curves", lambda *_: None)  # which takes seconds
    pixels = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "few.npz", train_x=pixels[:train], **({"test_x": pixels[-test:]} if test else {}))
    said: list[str] = []
    prepare = images._pretrain
    monkeypatch.setattr(
        images, "_pretrain", lambda *given: said.append(capsys.readouterr().err) or prepare(*given)
    )
    output = tmp_path / "run"
    assert run("train", PLAIN, output, tmp_path / "few.npz", "steps=3", "features=efflite0") == 0
    lines = [*lines, "this run pretrains a network of its own for 2 iterations; start= names a pretrained"]
    assert all(line in said[0] for line in lines)
    summary = json.loads((output / "summary.json").read_text())
    assert [name for name in summary if "means" in name] == kept
    monkeypatch.setattr(images.GaussianSampler, "sample", lambda *_, **__: torch.full((4, 3, 8, 8), math.nan))
    assert cli.main(["evaluate", str(output)]) == 0
    assert not kept or "metrics of samples: skipped, samples: some of rows" in capsys.readouterr().err


def test_a_run_starts_from_another_and_is_scored(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(features, "load", lambda _: features.Extractor(Means(), "means"))
    first, second = tmp_path / "first", tmp_path / "second"
    scored = ["features=efflite0", "evaluate_n=24"]
    assert run("pretrain", PLAIN, first, data, "steps=4", *scored) == 0
    assert run("train", PLAIN, second, data, f"start={first}", *scored) == 0
    summary = json.loads((second / "summary.json").read_text())
    assert summary["fd_means_24"] > 0 and "fd_means_24_floor" in summary
    assert {row["phase"] for row in read_metrics(second / "metrics.jsonl")} == {"dxmi"}
    capsys.readouterr()
    picture = first.parent / "grid.png"
    neighbors = tmp_path / "neighbors.png"
    settings = images.EvaluateSettings(
        chain="ddim-6", n=12, picture=str(picture), neighbors=str(neighbors), against="noise"
    )
    numbers, table = images.evaluate(first, settings, torch.device("cpu"))
    assert numbers["fd_means_12"] > 0 and "test images" in table and picture.stat().st_size > 100
    assert 0 <= numbers.pop("auroc_noise") <= 1 and "auroc_noise" in table
    assert numbers["fd_means_12_test"] > 0 and neighbors.stat().st_size > 100
    bounded: list[float] = []
    monkeypatch.setattr(Clipped, "forward", lambda self, x, *_: bounded.append(self.out[-1].item()) or x)
    settings = images.EvaluateSettings(chain="ddim-6-clipped", n=12)
    assert images.evaluate(first, settings, torch.device("cpu"))[0].keys() == numbers.keys()
    assert len(bounded) == 6 and bounded[0] == pytest.approx(-0.01, rel=0.01)  # -noise / signal at level 0
    with pytest.raises(
        ConfigError, match=r"chain must be ddim-STEPS or ddpm-STEPS or fastdpm-ST.* got 'edm-4'"
    ):
        images.evaluate(first, images.EvaluateSettings(chain="edm-4"), torch.device("cpu"))


@pytest.mark.parametrize(
    ("schedule", "trained_for", "chain"),
    [
        ("edm", {"_class_name": "EDMEulerScheduler", "sigma_data": 0.4, "time_scale": 1000.0}, "edm-5"),
        (
            "ddim",
            {
                "_class_name": "DDPMScheduler",
                "beta_schedule": "squaredcos_cap_v2",
                "num_train_timesteps": 80,
            },
            "ddpm-80",
        ),
    ],
)
def test_a_run_keeps_what_its_network_was_trained_for(
    schedule: str, trained_for: dict[str, object], chain: str, data: Path, tmp_path: Path
) -> None:
    """From a diffusers folder to a run, from that to another run, and in another chain."""
    pretrained.save(unet.unet("small", (3, 8, 8)), tmp_path / "folder", trained_for)
    settings = [f"schedule={schedule}", "steps=3"]
    assert run("train", "cifar10-t10", tmp_path / "first", data, f"start={tmp_path}/folder", *settings) == 0
    assert run("train", "cifar10-t10", tmp_path / "second", data, f"start={tmp_path}/first", *settings) == 0
    cfg, networks, diffusion = model.load(tmp_path / "second", torch.device("cpu"))
    time = networks.sampler.network.time
    if schedule == "edm":
        expected = schedules.edm(5, eta=0.0, sigma_data=0.4, time_scale=1000.0)
        torch.testing.assert_close(time, schedules.edm(3, time_scale=1000.0).time.float())
    else:
        betas = schedules.make_betas("cosine", steps=80)
        expected = schedules.ddim(80, eta=1.0, large_std=True, betas=betas)
        assert time.tolist() == [52, 26, 0]
        with pytest.raises(
            ConfigError, match=r"chain must be ddim-STEPS or ddpm-STEPS or heun-.* got 'ddim-81'"
        ):
            chains.named("ddim-81", networks.sampler, cfg, diffusion)
    other = chains.named(chain, networks.sampler, cfg, diffusion)
    for name in ("sample_coef", "output_coef", "log_std"):
        torch.testing.assert_close(getattr(other, name).detach(), getattr(expected, name).float())
    solved = chains.named("dpmpp-4", networks.sampler, cfg, diffusion).sample(2, ops.noise_key(0))
    assert solved.shape == (2, 3, 8, 8) and solved.isfinite().all()


def test_pretraining_draws_the_levels_and_rates_of_its_settings() -> None:
    settings = {"schedule": "edm", "time_scale": 1000.0, "level_mean": -0.9, "level_std": 0.5}
    settings |= {"pretrain_iterations": 10, "pretrain_lr": 1.0, "pretrain_warmup": 3}
    cfg = images.Config().replace(recipe="r", **settings)  # type: ignore[arg-type]
    network, diffusion = model.network_of(cfg, (1, 8, 8), None)
    pretrainer = images._pretrainer(cfg, network, diffusion, torch.contiguous_format, Ranks())
    levels = pretrainer._draw_levels(4096, ops.noise_key(0), 0)
    log_sigma = levels.noise.log()
    assert log_sigma.mean().item() == pytest.approx(-0.9, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(levels.time, 250 * log_sigma, rtol=1e-4, atol=1e-3)
    rates = []
    for iteration in range(10):
        pretrainer.learner.rates.at(iteration)
        rates.append(float(pretrainer.learner.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx([0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


class Oracle(torch.nn.Module):
    """A network with exact predictions for data that are all the same; its weight has no effect."""

    def __init__(self, data: torch.Tensor, diffusion: DDPM | EDM, prediction: str) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.data, self.diffusion, self.prediction = data, diffusion, prediction

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        time, sigma_data = time.double().view(-1, 1, 1, 1), 1.0
        if isinstance(self.diffusion, EDM):
            signal, noise = torch.ones_like(time), (4 * time / self.diffusion.time_scale).exp()
            sigma_data = self.diffusion.sigma_data
            x = x * (noise**2 + sigma_data**2).sqrt()
        else:
            alpha_bar = (1 - self.diffusion.betas).cumprod(0)[time.long()]
            signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        eps = (x - signal * self.data) / noise
        target = schedules.target(self.prediction, self.data, eps, signal, noise, sigma_data)
        return target.expand_as(x) + 0 * self.weight


@pytest.mark.parametrize("prediction", ["eps", "v", "x", "edm"])
def test_pretraining_predicts_what_the_samplers_steps_use(prediction: str) -> None:
    """Noise levels, times and input scales are the same for both; with eta = 0, at every step."""
    data = torch.linspace(-1, 1, 48, dtype=torch.float64).view(3, 4, 4)
    settings = {"schedule": "edm", "sigma_data": 0.3} if prediction == "edm" else {"schedule": "ddim"}
    cfg = images.Config().replace(recipe="r", steps=4, eta=0.0, min_std=1e-6, **settings)  # type: ignore[arg-type]
    diffusion: DDPM | EDM = EDM(sigma_data=0.3, time_scale=1000.0)
    if prediction != "edm":
        diffusion = DDPM(schedules.make_betas(), model._KINDS[prediction])
    oracle, schedule = Oracle(data, diffusion, prediction), model.schedule_of(cfg, diffusion, cfg.chain.steps)
    sampler = GaussianSampler(Timed(oracle, schedule), schedule, data.shape).double()
    path = sampler.rollout(2, ops.noise_key(0)).samples
    signal, noise = schedule.signal.tolist(), schedule.noise.tolist()
    eps = (path[0] - signal[0] * data) / noise[0]
    for t, x in enumerate(path[:-1]):
        torch.testing.assert_close(x, signal[t] * data + noise[t] * eps, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(path[-1], data.expand_as(path[-1]), rtol=0, atol=1e-3)
    if prediction == "edm":
        solver = chains._solver("heun", 4, oracle, cfg, diffusion, data.shape, clip=False)
        solved = solver.sample(2, ops.noise_key(0))
        torch.testing.assert_close(solved, data.float().expand_as(solved), rtol=0, atol=1e-3)
    pretrainer = images._pretrainer(cfg, oracle, diffusion, torch.contiguous_format, Ranks())
    assert pretrainer.step(data.expand(64, 3, 4, 4).clone())["loss"] < 1e-6


def test_a_sampler_of_several_lengths_is_scored_and_samples_with_any(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "load", lambda _: features.Extractor(Means(), "means"))
    network = ["unet=small", "schedule=edm", "energy_network=encoder", "value_kind=per_step"]
    scored = ["features=efflite0", "evaluate_n=24"]
    assert run("train", PLAIN, tmp_path, data, "steps=3", "lengths=2,3", *network, *scored) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["fd_means_24"] > 0 and summary["fd_means_24_t2"] > 0 and "fd_means_24_t3" not in summary

    def score(**settings: Any) -> float:
        settings = {"n": 24, **settings}
        return images.evaluate(tmp_path, images.EvaluateSettings(**settings), torch.device("cpu"))[0][
            "fd_means_24"
        ]

    assert score() == pytest.approx(summary["fd_means_24"])
    assert score(steps=2) == pytest.approx(summary["fd_means_24_t2"])
    assert score(steps=5) > 0
    with pytest.raises(ConfigError, match="steps must be null with chain=edm-4, got 5"):
        score(steps=5, chain="edm-4")
    drawn = images.sample(tmp_path, range(2), 0, None, torch.device("cpu"), steps=7)
    assert next(iter(drawn)).samples.shape == (2, 3, 8, 8)
    sampler = images.load(tmp_path, torch.device("cpu"))[1].sampler
    torch.nn.init.ones_(sampler.std_offset.last.bias)
    last = sampler.after(torch.arange(sampler.end)) == sampler.end
    assert torch.equal(sampler.log_std == sampler.schedule_log_std, last)  # train_last_std=false


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["schedule=edm", "lengths=2,4", "steps=3"], "lengths must include steps=3, got 2,4"),
        (["lengths=2,4", "steps=2"], "lengths must be null unless schedule=edm, conditional=false, and"),
        (["data=null"], "data must be the path of images, got null"),
        (["unet=cifar10", "image_size=12"], "data_shape must be (C, H, W) with H and W multiples of "),
        (["steps=1001"], "steps must be <= train_steps=1000, got 1001"),
        (["sigma_min=90"], "sigma_min must be < sigma_max=80.0, got 90.0"),
        (["pretrain_iterations=0"], "start must be a network with pretrain_iterations=0"),
        (["cuda_graph=true"], "cuda_graph must be false without a CUDA device"),
        (["negatives=short_run"], "negatives must be sampler or refined in image recipes, got short_run"),
        (["pretrained=false", "start=run"], "pretrained must be true with start=run"),
        (["energy_lr=.1"], "energy_lr needs value_kind=separate, got energy_lr=0.1"),
        (["evaluate_n=3"], "evaluate_n must be >= 4, got 3"),
    ],
)
def test_bad_settings(
    settings: list[str], message: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("train", PLAIN, tmp_path, data, *settings) == 2
    shown = capsys.readouterr().err
    assert message in shown and "pretrain: " not in shown


def test_a_run_without_results_takes_other_settings(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared, right = [f"cache={tmp_path / 'cache'}", "steps=3"], tmp_path / "right.npz"
    assert run("pretrain", PLAIN, tmp_path / "run", right, *shared) == 2
    assert "right.npz does not exist" in capsys.readouterr().err
    assert run("pretrain", PLAIN, tmp_path / "run", data, *shared) == 0
    before = (tmp_path / "run/config.yaml").read_text()
    assert run("pretrain", PLAIN, tmp_path / "run", right, *shared) == 2
    assert "does not exist" in capsys.readouterr().err
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_data_are_known_by_their_content_wherever_they_lie(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run is resumed and evaluated elsewhere, with moved data; with other data, both are refused."""
    monkeypatch.chdir(tmp_path)
    with np.load(data) as arrays:
        given = dict(arrays)
    np.savez("im.npz", **given)
    settings, name = ["steps=3", "cache=cache"], PLAIN
    assert run("pretrain", name, Path("run"), Path("./im.npz"), *settings) == 0
    assert run("train", name, Path("run"), Path("im.npz"), *settings) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    moved = (tmp_path / "run").rename(elsewhere / "moved")
    assert cli.main(["evaluate", "moved", "device=cpu", "n=4"]) == 0
    (tmp_path / "im.npz").rename("there.npz")
    assert run("train", name, moved, Path("there.npz"), *settings, "iterations=3") == 0
    assert f"data: {elsewhere}/there.npz" in (moved / "config.yaml").read_text()
    Path("there.npz").rename("again.npz")
    assert cli.main(["evaluate", "moved", "data=gone.npz", "device=cpu", "n=4"]) == 2
    assert "gone.npz does not exist; data=PATH names another place" in capsys.readouterr().err
    assert cli.main(["evaluate", "moved", "data=again.npz", "device=cpu", "n=4"]) == 0
    given["train_y"] = given["train_y"][::-1]  # the same images in other classes
    np.savez("other.npz", **given)
    capsys.readouterr()
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    assert run("train", name, moved, Path("other.npz"), *settings, "iterations=4") == 2
    assert run("train", name, moved, Path("other.npz"), *settings, "iterations=3") == 2  # already finished
    Path("again.npz").rename("kept.npz")
    Path("other.npz").rename("there.npz")  # other data at the path of the run's own
    assert run("train", name, moved, Path("there.npz"), *settings, "iterations=3") == 2
    Path("there.npz").rename("other.npz")
    assert cli.main(["evaluate", "moved", "data=other.npz", "device=cpu", "n=4"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all("fingerprint" in error for error in errors)
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before
