"""Converted networks against plain implementations in the checkpoints' layouts, with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext.engine.errors import UserError
from dxmi_ext.images.networks import convert, pretrained
from dxmi_ext.images.networks.pretrained import EDM
from dxmi_ext.images.networks.unet import ARCHITECTURES, unet_config

pytest.importorskip("diffusers")
State = dict[str, Tensor]


def embedded(time: Tensor, width: int) -> Tensor:
    """cos and sin of time at geometric frequencies 1 .. 1/10000; float32, as diffusers computes it."""
    frequencies = torch.exp(-torch.arange(width // 2) / (width // 2) * torch.tensor(10000.0).log())
    angles = time.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), 1).double()


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[N, heads, channels, pixels] each."""
    weights = torch.einsum("nhcq,nhck->nhqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("nhqk,nhck->nhcq", weights.softmax(-1), v)


def randomize(network: nn.Module, seed: int = 0) -> State:
    """Sets random weights, none of which is 0; resampling filters, which are buffers, stay."""
    generator = torch.Generator().manual_seed(seed)
    for p in network.double().parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 10
        p.data.normal_(float(p.ndim == 1), fan_in**-0.5, generator=generator)
    return dict(network.state_dict())


# --- the layout of guided-diffusion -------------------------------------------------------------------


class ResBlock(nn.Module):
    def __init__(
        self, inputs: int, outputs: int, embedding: int, scale_shift: bool, resample: str = ""
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.in_layers = nn.Sequential(nn.GroupNorm(32, inputs), nn.SiLU(), conv)
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, outputs * (1 + scale_shift)))
        conv = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.out_layers = nn.Sequential(nn.GroupNorm(32, outputs), nn.SiLU(), nn.Dropout(0.0), conv)
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers[2](resampled(self.in_layers[:2](x), self.resample))
        x = resampled(x, self.resample)
        e = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = e.chunk(2, 1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + e)
        return self.skip_connection(x) + h


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, head_channels: int) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).unflatten(1, (3, -1, self.head_channels)).unbind(1)
        return x + self.proj_out(attend(q, k, v).reshape(x.shape))


class GuidedDiffusion(nn.Module):
    """UNetModel of consistency models with resblock_updown; by default a minimal one with two halvings."""

    def __init__(
        self,
        scale_shift: bool,
        classes: int | None,
        outputs: int = 3,
        widths: tuple[int, ...] = (32, 32, 64),
        attends: tuple[bool, ...] = (False, True, True),
        blocks: int = 2,
        heads: int = 16,
    ) -> None:
        super().__init__()
        self.width, emb = widths[0], 4 * widths[0]

        def level(inputs: int, outputs: int, attention: bool) -> nn.ModuleList:
            layers: list[nn.Module] = [ResBlock(inputs, outputs, emb, scale_shift)]
            return nn.ModuleList([*layers, AttentionBlock(outputs, heads)] if attention else layers)

        self.time_embed = nn.Sequential(nn.Linear(self.width, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes is not None:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, self.width, 3, padding=1)])])
        c, kept = self.width, [self.width]
        for i, width in enumerate(widths):
            for _ in range(blocks):
                self.input_blocks.append(level(c, width, attends[i]))
                kept.append(c := width)
            if i < len(widths) - 1:
                self.input_blocks.append(nn.ModuleList([ResBlock(c, c, emb, scale_shift, "down")]))
                kept.append(c)
        self.middle_block = nn.ModuleList([*level(c, c, True), ResBlock(c, c, emb, scale_shift)])
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(widths))):
            for j in range(blocks + 1):
                layers = level(c + kept.pop(), c := widths[i], attends[i])
                if i and j == blocks:
                    layers.append(ResBlock(c, c, emb, scale_shift, "up"))
                self.output_blocks.append(layers)
        self.out = nn.Sequential(nn.GroupNorm(32, c), nn.SiLU(), nn.Conv2d(c, outputs, 3, padding=1))

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.time_embed(embedded(time, self.width))
        if labels is not None:
            emb = emb + self.label_emb(labels)
        kept = []
        for layers in self.input_blocks:
            for layer in layers:
                x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
            kept.append(x)
        for layer in self.middle_block:
            x = layer(x, emb)
        for layers in self.output_blocks:
            x = torch.cat((x, kept.pop()), 1)
            for layer in layers:
                x = layer(x, emb)
        return self.out(x)


def resampled(x: Tensor, how: str) -> Tensor:
    if how == "up":
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return F.avg_pool2d(x, 2) if how else x


# --- the layout of EDM --------------------------------------------------------------------------------


class Resample(nn.Module):
    """An optional convolution that may resample with a 2 x 2 filter, which is in the state dict."""

    def __init__(self, inputs: int, outputs: int, kernel: int, how: str = "") -> None:
        super().__init__()
        self.how, self.weight, self.bias = how, None, None
        if kernel:
            self.weight = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
            self.bias = nn.Parameter(torch.empty(outputs))
        self.register_buffer("resample_filter", torch.full((1, 1, 2, 2), 0.25) if how else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.how:
            f = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, 2, 2)
            if self.how == "up":
                x = F.conv_transpose2d(x, 4 * f, stride=2, groups=x.shape[1])
            else:
                x = F.conv2d(x, f, stride=2, groups=x.shape[1])
        return (
            x
            if self.weight is None
            else F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)
        )


class UNetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, emb: int, how: str = "", attention: bool = False) -> None:
        super().__init__()
        self.inputs = inputs
        self.norm0 = nn.GroupNorm(min(32, inputs // 4), inputs)
        self.conv0 = Resample(inputs, outputs, 3, how)
        self.affine = nn.Linear(emb, 2 * outputs)
        self.norm1 = nn.GroupNorm(min(32, outputs // 4), outputs)
        self.conv1 = Resample(outputs, outputs, 3)
        self.skip = (
            Resample(inputs, outputs, int(inputs != outputs), how) if how or inputs != outputs else None
        )
        self.heads = outputs // 64 if attention else 0
        if attention:
            self.norm2 = nn.GroupNorm(min(32, outputs // 4), outputs)
            self.qkv = Resample(outputs, 3 * outputs, 1)
            self.proj = Resample(outputs, outputs, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.affine(emb)[:, :, None, None].chunk(2, 1)
        h = self.conv0(F.silu(self.norm0(x)))
        h = self.conv1(F.silu(self.norm1(h) * (scale + 1) + shift))
        x = h + (x if self.skip is None else self.skip(x))
        if self.heads:
            q, k, v = self.qkv(self.norm2(x)).flatten(2).unflatten(1, (self.heads, -1, 3)).unbind(3)
            x = x + self.proj(attend(q, k, v).reshape(x.shape))
        return x


class Dhariwal(nn.Module):
    """DhariwalUNet on images of 8 x 8, attention at 4 x 4."""

    def __init__(self, classes: int | None, width: int = 128) -> None:
        super().__init__()
        self.width, emb, blocks = width, 4 * width, 1
        self.map_augment = nn.Linear(9, width, bias=False)
        self.map_layer0, self.map_layer1 = nn.Linear(width, emb), nn.Linear(emb, emb)
        self.map_label = None if classes is None else nn.Linear(classes, emb, bias=False)
        levels = (("8x8", width, False), ("4x4", 2 * width, True))
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        c, kept = width, [width]
        self.enc["8x8_conv"] = Resample(3, c, 3)
        for i, (name, outputs, attention) in enumerate(levels):
            if i:
                self.enc[f"{name}_down"] = UNetBlock(c, c, emb, "down")
                kept.append(c)
            for j in range(blocks):
                self.enc[f"{name}_block{j}"] = UNetBlock(c, outputs, emb, attention=attention)
                kept.append(c := outputs)
        self.dec["4x4_in0"], self.dec["4x4_in1"] = UNetBlock(c, c, emb, attention=True), UNetBlock(c, c, emb)
        for name, outputs, attention in reversed(levels):
            if name == "8x8":
                self.dec["8x8_up"] = UNetBlock(c, c, emb, "up")
            for j in range(blocks + 1):
                self.dec[f"{name}_block{j}"] = UNetBlock(c + kept.pop(), outputs, emb, attention=attention)
                c = outputs
        self.out_norm, self.out_conv = nn.GroupNorm(min(32, c // 4), c), Resample(c, 3, 3)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None) -> Tensor:
        emb = self.map_layer1(F.silu(self.map_layer0(embedded(time, self.width))))
        if self.map_label is not None:
            emb = emb + self.map_label(F.one_hot(labels, self.map_label.in_features).double())
        emb, kept = F.silu(emb), []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            kept.append(x)
        for block in self.dec.values():
            x = block(x if x.shape[1] == block.inputs else torch.cat((x, kept.pop()), 1), emb)
        return self.out_conv(F.silu(self.out_norm(x)))


# --- tests --------------------------------------------------------------------------------------------


def inputs(size: int, classes: int | None) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, size, size, generator=generator, dtype=torch.float64)
    time = torch.tensor([-1.2, 270.5], dtype=torch.float64)
    return (x, time) if classes is None else (x, time, torch.tensor([classes - 1, 0]))


@pytest.mark.parametrize("scale_shift, classes", [(True, 5), (False, None)])
def test_consistency_models_give_the_same(scale_shift: bool, classes: int | None) -> None:
    """For networks like those of ImageNet 64 (scale and shift, classes) and LSUN 256 (neither)."""
    reference = GuidedDiffusion(scale_shift, classes)
    network = convert.from_consistency(randomize(reference), image_size=16, head_channels=16)
    arguments = inputs(16, classes)
    with torch.no_grad():
        torch.testing.assert_close(network(*arguments), reference(*arguments), rtol=1e-6, atol=1e-6)


def test_published_consistency_models_have_the_papers_architectures() -> None:
    """They are determined by names and shapes alone, except for the number of heads."""
    for name, size, network in [
        ("imagenet64", 64, (True, 1000, 3, (192, 384, 576, 768), (False, True, True, True), 3, 64)),
        (
            "lsun256",
            256,
            (False, None, 3, (256, 256, 512, 512, 1024, 1024), (False,) * 3 + (True,) * 3, 2, 64),
        ),
    ]:
        with torch.device("meta"):
            state = GuidedDiffusion(*network).state_dict()
        converted = convert.from_consistency(state).model.config
        expected = unet_config(ARCHITECTURES[name], (3, size, size), network[1])
        assert {key: converted[key] for key in expected} == expected


@pytest.mark.parametrize("classes", [5, None])
def test_edm_networks_give_the_same(classes: int | None) -> None:
    """With and without the prefix of the preconditioning wrapper."""
    reference = Dhariwal(classes)
    prefix = "" if classes is None else "model."
    network = convert.from_edm({prefix + name: t for name, t in randomize(reference).items()})
    arguments = inputs(8, classes)
    with torch.no_grad():
        torch.testing.assert_close(network(*arguments), reference(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "kind, suffix, diffusion",
    [
        ("edm", ".pt", EDM()),
        ("consistency", ".pt", EDM(time_scale=1000, boundary=True)),
        ("consistency-teacher", ".safetensors", EDM(time_scale=1000)),
    ],
)
def test_folders_of_converted_checkpoints(kind: str, suffix: str, diffusion: EDM, tmp_path: Path) -> None:
    """They hold the network and its diffusion; half precision is widened."""
    reference, size, head_channels = (
        (Dhariwal(5), 8, 64) if kind == "edm" else (GuidedDiffusion(True, 5), 16, 16)
    )
    state = {name: t.half() for name, t in randomize(reference).items()}
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(state, path) if suffix == ".pt" else safetensors.torch.save_file(state, path)
    image_size = None if kind == "edm" else size
    convert.convert(path, kind, tmp_path / "out", image_size=image_size, head_channels=head_channels)

    loaded = pretrained.load(tmp_path / "out", (3, size, size), classes=5)
    assert loaded.diffusion == diffusion
    reference.load_state_dict(state)
    arguments = inputs(size, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            loaded.network.double()(*arguments), reference(*arguments), rtol=1e-6, atol=1e-6
        )


def test_consistency_folder_is_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    from diffusers import ConsistencyModelPipeline

    safetensors.torch.save_file(randomize(GuidedDiffusion(True, 5)), tmp_path / "model.safetensors")
    convert.convert(
        tmp_path / "model.safetensors", "consistency", tmp_path / "out", image_size=16, head_channels=16
    )
    pipeline = ConsistencyModelPipeline.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=1, class_labels=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def altered(state: State, **changes: Tensor | None) -> State:
    """The state with entries added, replaced or (None) removed; "__" stands for a dot."""
    named = {name.replace("__", "."): t for name, t in changes.items()}
    return {name: t for name, t in (state | named).items() if t is not None}


def test_networks_without_a_counterpart_are_rejected() -> None:
    guided, edm = randomize(GuidedDiffusion(True, None)), randomize(Dhariwal(None))
    one = torch.ones(1)
    read = {"consistency": convert.from_consistency, "edm": convert.from_edm}
    narrow, variances = randomize(Dhariwal(None, width=64)), randomize(GuidedDiffusion(True, None, outputs=6))
    blurred = {"enc__4x4_down__conv0__resample_filter": torch.ones(1, 1, 4, 4)}
    for kind, state, heads, message in [
        ("consistency", edm, 16, "not a checkpoint of this kind"),
        ("edm", guided, 64, "not a checkpoint of this kind"),
        ("consistency", altered(guided, input_blocks__3__0__op__weight=one), 16, "resblock_updown"),
        ("consistency", altered(guided, extra=one), 16, "entries that no layer uses: extra"),
        ("consistency", altered(guided, time_embed__2__bias=None), 16, "time_embed.2.bias is missing"),
        ("consistency", altered(guided, time_embed__2__bias=one), 16, "does not describe one ADM network"),
        ("consistency", guided, 24, "head_channels must divide .* got 24"),
        ("consistency", variances, 16, "learned variances"),
        ("edm", altered(edm, dec__8x8_aux_norm__weight=one), 64, "SongUNet"),
        ("edm", altered(edm, **blurred), 64, "mean of 2 x 2 pixels"),
        ("edm", narrow, 64, "groups"),
    ]:
        with pytest.raises(UserError, match=message):
            read[kind](state, head_channels=heads)


def test_files_that_are_not_read(tmp_path: Path) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "pickle.pkl")
    torch.save({"state": {"a": torch.ones(1)}}, tmp_path / "nested.pt")
    torch.save({0: torch.ones(1)}, tmp_path / "numbered.pt")
    torch.save({"enc.8x8_block0.conv1.weight": torch.tensor(1.0)}, tmp_path / "scalar.pt")
    (tmp_path / "text.safetensors").write_text(json.dumps({}))
    for name, kind, message in [
        ("absent.pt", "edm", "does not exist"),
        ("pickle.pkl", "edm", "pickled objects"),
        ("nested.pt", "edm", "expected a state dict"),
        ("numbered.pt", "edm", "expected a state dict"),
        ("scalar.pt", "edm", "not a checkpoint of this kind"),
        ("text.safetensors", "edm", "not a state dict"),
        ("pickle.pkl", "ddpm", "kind must be one of .* got 'ddpm'"),
    ]:
        with pytest.raises(UserError, match=message):
            convert.convert(tmp_path / name, kind, tmp_path / "out")
    with pytest.raises(UserError, match=r"image_size must be null with kind=edm.* got 8"):
        convert.convert(tmp_path / "scalar.pt", "edm", tmp_path / "out", image_size=8)
    assert not (tmp_path / "out").exists()
