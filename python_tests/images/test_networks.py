"""Networks for images: sizes, conditions, diffusers folders, EDM's formulas."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.networks import pretrained
from dxmi_ext.images.networks.encoder import EncoderEnergy, EncoderValue, load_encoders
from dxmi_ext.images.networks.energy import ResNetEnergy, ResNetValue
from dxmi_ext.images.networks.pretrained import EDM
from dxmi_ext.images.networks.unet import ARCHITECTURES, Architecture, UNet, unet
from dxmi_ext.method.networks import TimeIndependent

pytest.importorskip("diffusers")
TINY = Architecture(8, (1, 2), blocks=1, attention=(4,))


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def shaken(network: nn.Module) -> nn.Module:
    """The network with all weights perturbed, since many are zero at first."""
    generator = torch.Generator().manual_seed(0)
    for p in network.parameters():
        p.data.add_(torch.randn(p.shape, generator=generator), alpha=0.1)
    return network


# --- U-Nets -------------------------------------------------------------------------------------------


def test_paper_architectures_have_the_published_sizes() -> None:
    """36M (DDPM, CIFAR-10), 296M (ADM, ImageNet 64) and, as its checkpoint has, 526M (LSUN 256)."""
    shapes = {
        "cifar10": (3, 32, 32),
        "imagenet64": (3, 64, 64),
        "lsun256": (3, 256, 256),
        "small": (1, 28, 28),
        "compact": (1, 28, 28),
    }
    classes = {"imagenet64": 1000}
    with torch.device("meta"):
        sizes = {name: size(unet(name, shape, classes.get(name))) for name, shape in shapes.items()}
        patched = size(unet("compact", (1, 28, 28), patch=2))
    assert shapes.keys() == ARCHITECTURES.keys()
    assert sizes == {
        "cifar10": 35_746_307,
        "imagenet64": 295_899_267,
        "lsun256": 526_304_771,
        "small": 686_769,
        "compact": 996_321,
    }
    assert patched == 1_081_892


@pytest.mark.parametrize(
    ("name", "shape", "patch"),
    [("small", (1, 28, 28), 1), ("small", (3, 32, 32), 1), ("compact", (1, 28, 28), 2)],
)
def test_unet_starts_at_zero_and_depends_on_all_its_inputs(
    name: str, shape: tuple[int, int, int], patch: int
) -> None:
    network = unet(name, shape, classes=3, patch=patch)
    x, time, labels = (
        torch.randn(1, *shape).expand(3, *shape),
        torch.tensor([5, 5, 900]),
        torch.tensor([0, 2, 0]),
    )
    with torch.no_grad():
        assert not network(x, time, labels).any()
        rows = shaken(network)(x, time, labels)
    assert rows.shape == x.shape
    assert not torch.allclose(rows[0], rows[1])  # labels differ
    assert not torch.allclose(rows[0], rows[2])  # times differ


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_unet_computes_in_the_dtype_of_its_weights(dtype: torch.dtype) -> None:
    network = unet(TINY, (1, 8, 8)).to(dtype)
    x = torch.randn(2, 1, 8, 8, dtype=dtype)
    assert network(x, torch.tensor([0.5, 3.0])).dtype == dtype


def test_a_patched_unet_sees_squares_of_pixels_as_channels() -> None:
    """If the network works pixel by pixel, an output depends only on the pixels of its square."""
    network, asked = unet(TINY, (1, 8, 8), patch=2), torch.zeros(4, 1, 8, 8)
    network.model.forward = lambda x, *_, **__: (x.sum(1, keepdim=True).expand_as(x),)
    asked[0, 0, 0, 0] = asked[1, 0, 1, 1] = asked[2, 0, 2, 2] = 1
    out = network(asked, torch.zeros(4))
    square = torch.zeros(8, 8)
    square[:2, :2] = 1
    assert torch.equal(out[:, 0], torch.stack([square, square, square.roll((2, 2), (0, 1)), 0 * square]))


def test_unet_names_what_is_wrong() -> None:
    for arguments, message in [
        (("cifar", (3, 32, 32)), "did you mean cifar10"),
        (("cifar10", (3, 28, 28)), "multiples of 8"),
        (("small", (28, 28)), "data_shape must be .C, H, W."),
        (("small", (1, 28, 28), None, 3), "H and W multiples of 12, got .1, 28, 28."),
        ((Architecture(50, (1,), 1, ()), (1, 8, 8)), "width must be a multiple of .* got 50"),
        (
            (Architecture(32, (1, 2), 1, (8,), head_channels=24), (1, 8, 8)),
            "head_channels must divide .* got 24",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            unet(*arguments)
    x, time = torch.zeros(2, 1, 8, 8), torch.zeros(2)
    with pytest.raises(ValueError, match="labels must be one of 3 classes for each row, got None"):
        unet(TINY, (1, 8, 8), classes=3)(x, time)
    with pytest.raises(ValueError, match="labels must be None, got some"):
        unet(TINY, (1, 8, 8))(x, time, time.long())


# --- energies -----------------------------------------------------------------------------------------


def test_energy_has_the_papers_size() -> None:
    assert size(ResNetEnergy(3)) == 5_134_594


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (2, 64, 64), (3, 256, 256)])
def test_energy_of_any_images(shape: tuple[int, int, int]) -> None:
    """It depends on every pixel, including the last row and column of odd sizes."""
    energy = shaken(ResNetEnergy(shape[0], width=4))
    x = torch.randn(2, *shape, requires_grad=True)
    values = TimeIndependent(energy)(x, torch.tensor([0, 3]))
    assert values.shape == (2,)
    (slope,) = torch.autograd.grad(values.sum(), x)
    assert slope.all()


def reference_energy(network: ResNetEnergy, x: Tensor) -> Tensor:
    """The network that the module's docstring describes, computed from the weights by name."""
    w, F = {name.removeprefix("network."): p for name, p in network.named_parameters()}, nn.functional

    def convolution(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    h = F.leaky_relu(convolution("first", x), 0.2)
    for i in range(6):
        name = f"blocks.{i}"
        skip = F.conv2d(h, w[f"{name}.skip.weight"]) if i in (0, 2, 4) else h
        h = convolution(f"{name}.conv2", F.leaky_relu(convolution(f"{name}.conv1", h), 0.2)) + skip
        if i in (0, 2, 4):
            h = (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4
        h = F.leaky_relu(h, 0.2)
    return w["scale"] * (h.mean((2, 3)) @ w["last.weight"][0]) + w["shift"]


def test_energy_is_what_its_module_says() -> None:
    energy = shaken(ResNetEnergy(3, width=8)).double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(energy(x), reference_energy(energy, x), rtol=1e-12, atol=1e-12)
    assert energy.network.blocks[1].conv2.out_channels == 8
    assert energy.network.blocks[2].conv2.out_channels == 16


def test_values_depend_on_their_conditions() -> None:
    """All steps and classes have the same values at first."""
    value, energy = ResNetValue(1, steps=4, width=4, classes=3), ResNetEnergy(1, width=4, classes=3)
    x = torch.randn(1, 1, 8, 8).expand(3, 1, 8, 8)
    timestep, labels = torch.tensor([0, 4, 0]), torch.tensor([1, 1, 2])
    with torch.no_grad():
        assert value(x, timestep, labels).unique().numel() == 1
        values, energies = shaken(value)(x, timestep, labels), shaken(energy)(x, labels)
    assert values.unique().numel() == 3
    assert energies.unique().numel() == 2
    with pytest.raises(ValueError, match="labels must be one of 3 classes for each row, got None"):
        value(x, timestep)


def encoder(channels: int = 1) -> tuple[UNet, EncoderValue]:
    network = shaken(unet(TINY, (channels, 8, 8), classes=3)).eval()
    return network, shaken(
        EncoderValue(network, torch.linspace(90, 0, 5), torch.linspace(0.5, 1, 5), width=4)
    )


def test_an_encoder_is_frozen_and_that_of_the_unet() -> None:
    """Its features are those of the U-Net; only the heads are trained."""
    network, value = encoder()
    x, timestep, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 4]), torch.tensor([0, 2])
    seen: list[Tensor] = []
    network.model.mid_block.register_forward_hook(lambda module, given, output: seen.append(output))
    scale, time = value.input_scale[timestep], value.time[timestep]
    network(scale[:, None, None, None] * x, time, labels)
    value.encoder.load_state_dict({k: network.model.state_dict()[k] for k in value.encoder.state_dict()})
    value.heads[-1].register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    value(x.requires_grad_(), timestep, labels).sum().backward()
    torch.testing.assert_close(seen[1], seen[0])
    assert x.grad is not None and x.grad.any()
    assert {name for name, p in value.named_parameters() if p.grad is not None and p.grad.any()} == {
        name for name, _ in value.named_parameters() if not name.startswith("encoder")
    }
    with pytest.raises(ValueError, match="labels must be one of 3 classes for each row, got None"):
        value(x, timestep)


def test_an_encoder_takes_the_weights_of_a_pretrained_network() -> None:
    network, value = encoder()
    energy = EncoderEnergy(network, torch.tensor(3.0), torch.tensor(1.0), width=4)
    other = shaken(unet(TINY, (1, 8, 8), 3))
    load_encoders(nn.ModuleList((value, energy)), other)
    for copied in (value.encoder, energy.value.encoder):
        for name, weight in copied.state_dict().items():
            assert torch.equal(weight, other.model.state_dict()[name])


# --- all ----------------------------------------------------------------------------------------------

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: unet(Architecture(8, (1, 2), blocks=1, attention=()), (2, 8, 8), classes=3),
    "energy": lambda: TimeIndependent(ResNetEnergy(2, width=4, classes=3)),
    "value": lambda: ResNetValue(2, steps=4, width=4, classes=3),
    "encoder": lambda: encoder(channels=2)[1],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_channels_last_and_compiled_networks_give_the_same(name: str) -> None:
    """Compiled as one graph; with channels_last, the gradients are the same too."""
    network = shaken(NETWORKS[name]()).double()
    x, timestep = torch.randn(3, 2, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 4])
    labels = torch.tensor([0, 1, 2])

    def run(x: Tensor) -> tuple[Tensor, ...]:
        result = network(x, timestep, labels)
        learned = [p for p in network.parameters() if p.requires_grad]
        return result, *torch.autograd.grad(result.square().sum(), learned)

    expected = run(x)
    with torch.no_grad():
        compiled = torch.compile(network, backend="eager", fullgraph=True)(x, timestep, labels)
    torch.testing.assert_close(compiled, expected[0])
    network.to(memory_format=torch.channels_last)
    torch.testing.assert_close(run(x.to(memory_format=torch.channels_last)), expected)


# --- folders ------------------------------------------------------------------------------------------

LINEAR = {"_class_name": "DDPMScheduler", "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def saved(path: Path, scheduler: dict[str, object] = LINEAR, classes: int | None = None) -> UNet:
    network = unet(TINY, (1, 8, 8), classes)
    pretrained.save(shaken(network), path, scheduler)
    return network


def test_folders_come_back(tmp_path: Path) -> None:
    """The folder of a pipeline or of its U-Net is loaded; diffusers reads it too."""
    from diffusers import DDPMPipeline

    network = saved(tmp_path / "ddpm", classes=3).eval()
    x, time, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 30]), torch.tensor([0, 2])
    for folder in (tmp_path / "ddpm", tmp_path / "ddpm" / "unet"):
        loaded = pretrained.load(folder, (1, 8, 8), classes=3)
        assert torch.equal(loaded.network(x, time, labels), network(x, time, labels))
        assert isinstance(loaded.diffusion, pretrained.DDPM)
        assert loaded.diffusion.prediction == "epsilon"
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "ddpm", low_cpu_mem_usage=False)
    assert torch.equal(pipeline.unet(x, time, labels).sample, network(x, time, labels))


def test_flat_folders_and_those_without_a_scheduler(tmp_path: Path) -> None:
    """Like google/ddpm-cifar10-32: config, weights and scheduler side by side, and old names of attention."""
    network = saved(tmp_path / "a").eval()
    (tmp_path / "a" / "unet").rename(tmp_path / "flat")
    weights = tmp_path / "flat" / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(weights)
    for new, name in old.items():
        tensors = {key.replace(f".{new}.", f".{name}."): tensor for key, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, weights)
    loaded = pretrained.load(tmp_path / "flat", (1, 8, 8))
    x, time = torch.randn(2, 1, 8, 8), torch.tensor([1, 30])
    assert torch.equal(loaded.network(x, time), network(x, time))
    assert loaded.diffusion is None
    (tmp_path / "a" / "scheduler" / "scheduler_config.json").rename(
        tmp_path / "flat" / "scheduler_config.json"
    )
    assert isinstance(pretrained.load(tmp_path / "flat", (1, 8, 8)).diffusion, pretrained.DDPM)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "sigmoid", "squaredcos_cap_v2", "trained"])
def test_betas_are_those_of_diffusers(schedule: str) -> None:
    from diffusers import DDPMScheduler

    config: dict[str, object] = {
        "beta_schedule": schedule,
        "num_train_timesteps": 50,
        "prediction_type": "sample",
    }
    if schedule == "trained":
        config = {"trained_betas": [0.1, 0.2, 0.3]}
    diffusion = pretrained.read_diffusion(LINEAR | config)
    expected = DDPMScheduler.from_config(LINEAR | config)
    assert isinstance(diffusion, pretrained.DDPM)
    assert diffusion.betas.dtype == torch.float64
    torch.testing.assert_close(diffusion.betas.float(), expected.betas, rtol=2e-5, atol=0)
    assert diffusion.prediction == expected.config.prediction_type


def test_edm_schedulers_are_understood_and_others_rejected() -> None:
    edm = {"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "sigma_max": 50.0}
    assert pretrained.read_diffusion(edm) == EDM(sigma_data=1.0, sigma_max=50.0)
    for scheduler, message in [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "got FlowMatchEulerDiscreteScheduler"),
        (edm | {"prediction_type": "v_prediction"}, "prediction_type must be epsilon"),
        (LINEAR | {"prediction_type": "flow"}, "prediction_type must be one of epsilon"),
        (LINEAR | {"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        (LINEAR | {"beta_schedule": "exp"}, "beta_schedule must be linear, .* got exp"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrained.read_diffusion(scheduler)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    for shape, classes, message in [
        ((3, 8, 8), None, "expected a network of 3 channels, got 1 to 1"),
        ((1, 16, 16), None, "expected a network for images of .16, 16., got one for .8, 8."),
        ((1, 9, 9), None, "multiples of 2"),
        ((1, 8, 8), 3, "expected a network of 3 classes, got no"),
    ]:
        with pytest.raises(UserError, match=message):
            pretrained.load(tmp_path / "a", shape, classes)


def test_weights_that_are_pickled_missing_or_others_are_rejected(tmp_path: Path) -> None:
    saved(tmp_path / "a")
    with pytest.raises(UserError, match=r"config\.json is missing"):
        pretrained.load(tmp_path / "nowhere", (1, 8, 8))
    weights = tmp_path / "a" / "unet" / "diffusion_pytorch_model.safetensors"
    config = tmp_path / "a" / "unet" / "config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"layers_per_block": 2}))
    with pytest.raises(UserError, match="size mismatch"):
        pretrained.load(tmp_path / "a", (1, 8, 8))
    config.write_text(json.dumps(settings | {"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UserError, match="expected a UNet2DModel"):
        pretrained.load(tmp_path / "a", (1, 8, 8))
    config.write_text(json.dumps(settings))
    tensors = safetensors.torch.load_file(weights)
    del tensors["conv_in.bias"]
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(UserError, match=r"disagree, among others on conv_in\.bias"):
        pretrained.load(tmp_path / "a", (1, 8, 8))
    weights.write_bytes(b"no tensors")
    with pytest.raises(UserError, match="unet"):
        pretrained.load(tmp_path / "a", (1, 8, 8))
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(pickle.dumps({}))
    with pytest.raises(UserError, match="pickled weights, which are not read"):
        pretrained.load(tmp_path / "a", (1, 8, 8))


@pytest.mark.parametrize(
    ("file", "entries"),
    [
        ("unet/config.json", {"_class_name": "UNet2DModel"}),
        ("unet/config.json", {"_class_name": "UNet2DModel", "block_out_channels": 8}),
        ("scheduler/scheduler_config.json", LINEAR | {"beta_start": None}),
        ("scheduler/scheduler_config.json", LINEAR | {"num_train_timesteps": 0}),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMEulerScheduler", "sigma_data": "x"}),
    ],
)
def test_a_damaged_config_is_named(tmp_path: Path, file: str, entries: dict[str, object]) -> None:
    saved(tmp_path / "a")
    (tmp_path / "a" / file).write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"a: a config has a missing or invalid entry: "):
        pretrained.load(tmp_path / "a", (1, 8, 8))


def test_the_hub_is_asked_only_when_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only safetensors and configs of the repository named by "hub:" are downloaded."""
    saved(tmp_path / "snapshot")
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append(name)
        assert not any("bin" in pattern or pattern == "*" for pattern in allow_patterns)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(UserError, match=r"config\.json is missing"):
        pretrained.load("google/ddpm-cifar10-32", (3, 32, 32))
    assert asked == []
    pretrained.load("hub:google/ddpm-cifar10-32", (1, 8, 8))
    assert asked == ["google/ddpm-cifar10-32"]
