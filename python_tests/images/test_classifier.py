"""The classifier whose features are used by metrics: trained once, then read from the cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dxmi_ext.images import evaluation
from dxmi_ext.images.data.dataset import ImageData
from dxmi_ext.images.metrics import classifier, distances
from dxmi_ext.images.metrics.features import FeatureError
from dxmi_ext.images.settings import Config

pytest.importorskip("safetensors")
pytest.importorskip("tqdm")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classifier, "_STEPS", 30)
    monkeypatch.setattr(classifier, "_BATCH", 32)


def two_kinds(n: int = 200) -> ImageData:
    """Two classes of images: dark and bright noise."""
    draw, labels = np.random.default_rng(0), np.arange(n) // 7 % 2
    images = draw.integers(0, 120, (n, 1, 8, 8)) + 120 * labels[:, None, None, None]
    return ImageData(images.astype(np.uint8), labels.astype(np.int64))


def test_it_is_trained_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = two_kinds()
    first = classifier.extractor(data, cache=tmp_path)
    assert "features=classifier: accuracy 100.0% on held-out images" in capsys.readouterr().err
    assert classifier.extractor(data, cache=tmp_path / "other").identity == first.identity  # seeded
    (entry,) = tmp_path.glob("classifier-*/")
    with monkeypatch.context() as patch:
        patch.setattr(classifier, "_trained", pytest.fail)
        assert classifier.extractor(data, cache=tmp_path).identity == first.identity
    (entry / "classifier.safetensors").write_bytes(b"damaged")
    assert classifier.extractor(data, cache=tmp_path).identity == first.identity
    assert data.labels is not None
    others = ImageData(data.images, 1 - data.labels)  # other labels, another classifier
    assert classifier.extractor(others, cache=tmp_path).identity != first.identity


def test_features_distinguish_kinds(tmp_path: Path) -> None:
    data = two_kinds()
    assert data.labels is not None
    extractor = classifier.extractor(data, cache=tmp_path)
    bright, dark = (torch.from_numpy(data.images[data.labels == kind]) for kind in (1, 0))
    sets = bright[:80:2], bright[1:80:2], dark[:40]
    found = [distances.statistics([images], extractor, keep=40)[0] for images in sets]
    near, far = (distances.compare(other, found[0], extractor) for other in found[1:])
    assert far["fd_classifier_40"] > 20 * near["fd_classifier_40"]
    assert far["recall_classifier_40"] == 0 < near["recall_classifier_40"]


def test_periodic_labels_keep_every_class_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifier, "_HELD_OUT", 2)
    images = two_kinds(60).images
    images[::2], images[1::2] = images[::2] // 3, 160 + images[1::2] // 3
    classifier.extractor(ImageData(images, np.arange(60) % 2), cache=tmp_path)
    assert "accuracy 100.0% on held-out images" in capsys.readouterr().err


def test_names_of_extractors_may_have_spaces_between_them(tmp_path: Path) -> None:
    cfg = Config.of({"features": "classifier, classifier", "cache": str(tmp_path)})
    assert [found.name for found in evaluation.extractors(cfg, two_kinds())] == ["classifier"] * 2


@pytest.mark.parametrize("labels", [None, np.zeros(10, np.int64)])
def test_images_without_classes_are_rejected(labels: np.ndarray | None, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"requires labels of >= 2 classes, got [01]"):
        classifier.extractor(ImageData(np.zeros((10, 1, 8, 8), np.uint8), labels), cache=tmp_path)
