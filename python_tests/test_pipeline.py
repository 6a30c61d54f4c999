"""The diffusers scheduler and pipeline against their sampler, in this process and in a fresh one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.images.networks.unet import UNet
from dxmi_ext.method import schedules
from dxmi_ext.method.lengths import MultiLengthSampler
from dxmi_ext.method.sampler import Clipped, GaussianSampler, Timed
from dxmi_ext.method.schedules import Schedule

diffusers = pytest.importorskip("diffusers", reason="the scheduler and pipeline are classes of diffusers")
register_to_config = pytest.importorskip("diffusers.configuration_utils").register_to_config
pipeline_module = pytest.importorskip("dxmi_ext.pipeline")
DxMIPipeline, DxMIScheduler = pipeline_module.DxMIPipeline, pipeline_module.DxMIScheduler

SHAPE = (3, 8, 8)
KEY = ops.noise_key(5)
SCHEDULES = {"fastdpm": schedules.fastdpm(4), "edm": schedules.edm(4, rho=4.0, stochastic_last=True)}


def make_sampler(schedule: Schedule, classes: int | None = None) -> GaussianSampler:
    """A sampler with a tiny random U-Net and changed sigmas, as if trained."""
    torch.manual_seed(0)
    unet = make_unet(classes=classes)
    sampler = GaussianSampler(Timed(unet.eval(), schedule), schedule, SHAPE)
    with torch.no_grad():
        sampler.log_std += 0.1 * torch.randn(sampler.steps)
    return sampler


def make_unet(channels: int = 3, size: int = 8, classes: int | None = None) -> Any:
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        add_attention=False,
        num_class_embeds=classes,
    )


def make_pipeline(sampler: GaussianSampler, **options: Any) -> Any:
    pipeline = DxMIPipeline(sampler.network.network, DxMIScheduler.from_sampler(sampler), **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("name", SCHEDULES)
def test_an_image_of_the_pipeline_is_the_samplers(name: str) -> None:
    sampler = make_sampler(SCHEDULES[name])
    images = make_pipeline(sampler)(4, key=KEY, sample_offset=3, output_type="raw").images
    assert torch.equal(images, sampler.sample(4, KEY, sample_offset=3))


def test_a_network_of_patches() -> None:
    """The network sees 12 channels of 4 x 4; images are 3 x 8 x 8."""
    sampler = make_sampler(SCHEDULES["edm"])
    network = UNet(make_unet(channels=12, size=4), patch=2)
    sampler.network = Timed(network.eval(), SCHEDULES["edm"])
    expected = sampler.sample(2, KEY)
    sampler.network.network = network.model
    assert torch.equal(make_pipeline(sampler, patch_size=2)(2, key=KEY, output_type="raw").images, expected)


def test_class_labels() -> None:
    sampler, labels = make_sampler(SCHEDULES["edm"], classes=10), torch.tensor([3, 1])
    pipeline = make_pipeline(sampler)
    expected = sampler.sample(2, KEY, labels)
    for given in (labels, [3, 1]):
        assert torch.equal(pipeline(2, class_labels=given, key=KEY, output_type="raw").images, expected)
    assert not torch.equal(pipeline(2, class_labels=[1, 3], key=KEY, output_type="raw").images, expected)
    with pytest.raises(ValueError, match=r"class_labels must have shape \[\d+\], one per image, got \[2\]"):
        pipeline(3, class_labels=labels, key=KEY)


def test_output_types_and_generators() -> None:
    pipeline = make_pipeline(make_sampler(SCHEDULES["fastdpm"]))
    raw = pipeline(2, key=KEY, output_type="raw").images
    (tensor,) = pipeline(2, key=KEY, output_type="pt", return_dict=False)
    assert torch.equal(tensor, (raw / 2 + 0.5).clamp(0, 1))
    array = pipeline(2, key=KEY, output_type="np").images
    assert torch.equal(torch.from_numpy(array).permute(0, 3, 1, 2), tensor)
    assert [image.size for image in pipeline(2, key=KEY).images] == [(8, 8)] * 2
    first, again, other = (
        pipeline(1, torch.Generator().manual_seed(seed), output_type="raw").images for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    half = pipeline.to(torch.bfloat16)(2, key=KEY, output_type="raw").images
    assert half.dtype == torch.float32  # steps are float32; only the network is bfloat16
    torch.testing.assert_close(half, raw, rtol=0.1, atol=0.1)


def test_steps_have_rows_of_their_own_times() -> None:
    """The same as the sampler's forward, including the log-probability, for steps in any order."""
    sampler = make_sampler(SCHEDULES["edm"])
    scheduler = DxMIScheduler.from_sampler(sampler)
    step, x = torch.tensor([2, 0, 3]), torch.randn(3, *SHAPE)
    time = scheduler.timesteps[step]
    with torch.no_grad():
        expected = sampler(x, step, KEY, sample_offset=1)
        output = sampler.network.network(scheduler.scale_model_input(x, time), time).sample
    actual = scheduler.step(output, time, x, key=KEY, sample_offset=1)
    assert torch.equal(actual.prev_sample, expected.next_sample)
    assert torch.equal(actual.log_prob, expected.log_prob)
    alone = scheduler.step(output[:1], time[0].item(), x[:1], key=KEY, sample_offset=1, return_dict=False)
    assert torch.equal(alone[0], actual.prev_sample[:1]) and torch.equal(alone[1], actual.log_prob[:1])
    assert scheduler.step(output.bfloat16(), time, x.bfloat16(), key=KEY).prev_sample.dtype == torch.bfloat16
    assert scheduler.step(output, time, x.double(), key=KEY).log_prob.dtype == torch.float64


def test_scheduler_folder_is_json_and_keeps_every_bit(tmp_path: Path) -> None:
    for scheduler in (
        DxMIScheduler.from_sampler(make_sampler(SCHEDULES["fastdpm"])),
        DxMIScheduler.from_schedule(SCHEDULES["edm"]),
    ):
        scheduler.save_pretrained(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["scheduler_config.json"]
        loaded = DxMIScheduler.from_pretrained(tmp_path)
        assert torch.equal(loaded._tables, scheduler._tables)
        assert loaded.init_noise_sigma == scheduler.init_noise_sigma


def test_a_pipeline_of_diffusers_takes_the_scheduler() -> None:
    """DDPMPipeline passes timesteps and a generator, like any pipeline."""
    sampler = make_sampler(SCHEDULES["fastdpm"])
    scheduler = DxMIScheduler.from_sampler(sampler)
    pipeline = diffusers.DDPMPipeline.__new__(diffusers.DDPMPipeline)
    diffusers.DiffusionPipeline.__init__(pipeline)  # DDPMPipeline's own replaces the scheduler
    pipeline.register_modules(unet=sampler.network.network, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=4, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


LOAD = """
import sys, numpy, diffusers

folder = sys.argv[1]
loaded = {"unaware": diffusers.DiffusionPipeline.from_pretrained(
    folder, custom_pipeline="pipeline", trust_remote_code=True
)}
import dxmi_ext.pipeline
from dxmi_ext import ops

loaded["aware"] = diffusers.DiffusionPipeline.from_pretrained(folder)
loaded["own"] = dxmi_ext.pipeline.DxMIPipeline.from_pretrained(folder)
for name, pipeline in loaded.items():
    assert type(pipeline) is dxmi_ext.pipeline.DxMIPipeline, type(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(3, key=ops.noise_key(5), output_type="raw").images
    numpy.save(f"{folder}/{name}.npy", images.numpy())
ours = {name[9:] for name in sys.modules if name.startswith("dxmi_ext.")}
tables = {name for name in ours if name.startswith("method.schedules")}
rooms = {"engine", "engine.arguments", "engine.compute", "engine.compute.calls", "method", "method.sampler"}
assert ours - tables == {"_native", "_C", "_gradients", "_shapes", "ops", "pipeline", *rooms}, ours
"""


def test_folder_loads_in_a_fresh_process(tmp_path: Path) -> None:
    """Offline and without the trainer, before and after importing dxmi_ext; a key gives the same images."""
    sampler = make_sampler(SCHEDULES["edm"])
    pipeline_module.save_pretrained(tmp_path, sampler.network.network, sampler)
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {
        "model_index.json",
        "pipeline.py",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "scheduler_config.json",
    }
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DxMIPipeline"
    assert index["scheduler"] == ["diffusers", "DxMIScheduler"]
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "home"),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for loader in ("unaware", "aware", "own"):
        images = torch.from_numpy(numpy.load(tmp_path / f"{loader}.npy"))
        assert torch.equal(images, sampler.sample(3, KEY))


def test_bad_input() -> None:
    sampler = make_sampler(SCHEDULES["fastdpm"])
    scheduler = DxMIScheduler.from_sampler(sampler)
    x, time = torch.zeros(2, *SHAPE), scheduler.timesteps[0]
    with pytest.raises(ValueError, match=r"num_inference_steps must be None or 4, .* got 50"):
        scheduler.set_timesteps(50)
    with pytest.raises(ValueError, match=r"timestep must be in scheduler.timesteps, \[321.*, got 1"):
        scheduler.step(x, 1, x)
    with pytest.raises(
        ValueError, match=r"timestep must be one value or one per row, \[2\], got shape \[3\]"
    ):
        scheduler.step(x, scheduler.timesteps[:3], x)
    with pytest.raises(ValueError, match="key must be None with a generator"):
        scheduler.step(x, time, x, torch.Generator(), key=KEY)
    with pytest.raises(TypeError, match="key must be a tensor from noise_key or None, got int"):
        make_pipeline(sampler)(key=3)
    with pytest.raises(TypeError, match="generator must be a single one, got a list"):
        scheduler.step(x, time, x, [torch.Generator()])
    with pytest.raises(ValueError, match="output_type must be pil, np, pt or raw, got 'jpg'"):
        make_pipeline(sampler)(output_type="jpg")
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        make_pipeline(sampler)(0)
    tables = {name: [0.0, 1.0] for name in pipeline_module.TABLES}
    with pytest.raises(ValueError, match="output_coef must have 2 values, one for each step, got 1"):
        DxMIScheduler(**{**tables, "output_coef": [1.0]})
    with pytest.raises(ValueError, match="sample_coef must have 1 values, one for each step, got 0"):
        DxMIScheduler(**{name: [] for name in tables})
    with pytest.raises(ValueError, match=r"time must have distinct values, got"):
        DxMIScheduler(**{**tables, "time": [1.0, 1.0]})
    with pytest.raises(TypeError, match="sampler must have a Timed network, got Linear"):
        DxMIScheduler.from_sampler(GaussianSampler(torch.nn.Linear(1, 1), SCHEDULES["edm"], SHAPE))
    schedule, network = SCHEDULES["fastdpm"], sampler.network
    clipped = Clipped(network.network, schedule, "eps")
    with pytest.raises(TypeError, match="sampler must have a Timed network, got Clipped"):
        DxMIScheduler.from_sampler(GaussianSampler(clipped, schedule, SHAPE))
    for other in (
        MultiLengthSampler(network, schedule, SHAPE, [1, 3]),
        GaussianSampler(network, schedule, SHAPE, start=torch.nn.Identity()),
    ):
        with pytest.raises(ValueError, match="sampler must have one length and start from noise, got"):
            DxMIScheduler.from_sampler(other)
