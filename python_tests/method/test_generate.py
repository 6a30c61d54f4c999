"""Files of samples: rows do not depend on batches, formats have the same pixels, and writes are atomic."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import plots, samples
from dxmi_ext.engine.output.plots import to_uint8
from dxmi_ext.engine.output.samples import Batch
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.method import generate, noise
from image_samplers import SEED, SHAPE, Network, make_networks, write
from rank_processes import spawn

Image = pytest.importorskip("PIL.Image")

DRAWN = torch.linspace(-1.1, 1.1, 5 * 3 * 4 * 4).view(5, 3, 4, 4)
LABELS = torch.tensor([4, 0, 2, 1, 3])


def in_batches(samples: torch.Tensor, *, labels: torch.Tensor | None = None) -> Iterator[Batch]:
    parts = [None] * len(samples) if labels is None else labels.split(2)
    yield from (Batch(*part) for part in zip(samples.split(2), parts, strict=False))


def pictures(folder: Path) -> np.ndarray:
    """[n, C, H, W], in the order of their names."""
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(len(files))]
    return np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files])


# --- drawing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch_size"), [(range(7), None), (range(7), 3), (range(3, 7), 2)])
def test_a_row_is_the_same_in_any_batch(rows: range, batch_size: int | None) -> None:
    networks, key = make_networks(Network()), ops.noise_key(SEED)
    labels = noise.randint(10, 7, noise.Draws(SEED, "labels of samples", ["labels"]).at(0)["labels"])
    wanted = networks.sampler.sample(7, key, labels)[rows.start :]
    parts = list(generate.batches(networks, rows, SEED, batch_size=batch_size, classes=10))
    sizes = [len(part.samples) for part in parts]
    assert sizes == {None: [7], 3: [3, 3, 1], 2: [2, 2]}[batch_size]
    drawn = Batch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    assert drawn.labels is not None and torch.equal(drawn.labels, labels[rows.start :])
    torch.testing.assert_close(drawn.samples, wanted, rtol=1e-4, atol=1e-5)
    in_turn = generate.batches(networks, range(1, 4), SEED, classes=10, labels="4,6")
    assert torch.equal(next(in_turn).labels, torch.tensor([6, 4, 6]))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "first"), [((2,), 4096), ((3, 32, 32), 341), ((3, 256, 256), 5), ((3, 2048, 2048), 1)]
)
def test_large_rows_come_in_small_batches(shape: tuple[int, ...], first: int) -> None:
    def sample(n: int, key: Any, labels: Any, **_: Any) -> torch.Tensor:
        return torch.zeros(n)

    sampler = SimpleNamespace(log_std=torch.zeros(1), data_shape=shape, sample=sample)
    networks: Any = SimpleNamespace(sampler=sampler)
    assert len(next(generate.batches(networks, range(10_000), 0)).samples) == first


def test_mistakes_are_told_before_drawing() -> None:
    networks, chains = make_networks(Network()), object()
    with pytest.raises(
        generate.ConfigError, match="labels must be null for networks without classes, got '3'"
    ):
        generate.batches(networks, range(2), 0, labels="3")
    with pytest.raises(
        generate.ConfigError, match=r"guidance must be 0 for a run of Langevin chains, got 0\.5"
    ):
        generate.batches(networks, range(2), 0, guidance=0.5, chains=chains)  # type: ignore[arg-type]


# --- writing -----------------------------------------------------------------------------------------


def test_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = samples.write(f"{tmp_path}/new/a.npz", 5, in_batches(DRAWN, labels=LABELS))
    assert said == "samples [5, 3, 4, 4] uint8, labels [5] int64"
    assert "sample: 5/5" in capsys.readouterr().err
    with np.load(tmp_path / "new" / "a.npz") as file:
        assert file["samples"].dtype == np.uint8 and file.files == ["samples", "labels"]
        np.testing.assert_array_equal(file["samples"], to_uint8(DRAWN))
        np.testing.assert_array_equal(file["labels"], LABELS)
    samples.write(f"{tmp_path}/b.npz", 5, in_batches(DRAWN.flatten(1)))  # points
    with np.load(tmp_path / "b.npz") as file:
        assert file.files == ["samples"]
        np.testing.assert_array_equal(file["samples"], DRAWN.flatten(1))


def test_images_and_grid_have_the_arrays_pixels(tmp_path: Path) -> None:
    samples.write(f"{tmp_path}/a/", 5, in_batches(DRAWN, labels=LABELS))
    np.testing.assert_array_equal(pictures(tmp_path / "a"), to_uint8(DRAWN))
    samples.write(f"{tmp_path}/gray/", 5, in_batches(DRAWN[:, :1]))
    gray = np.asarray(Image.open(tmp_path / "gray" / "000004.png"))
    np.testing.assert_array_equal(gray, to_uint8(DRAWN)[4, 0])
    samples.write(f"{tmp_path}/b.png", 5, in_batches(DRAWN))
    plots.images(tmp_path / "c.png", DRAWN)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "c.png").read_bytes()


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a/"])
def test_a_failure_leaves_what_was_there(tmp_path: Path, name: str) -> None:
    def fails() -> Iterator[Batch]:
        yield Batch(DRAWN[:2], None)
        raise KeyboardInterrupt

    if not name.endswith("/"):
        (tmp_path / name).write_text("before")
    before = list(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        samples.write(f"{tmp_path}/{name}", 5, fails())
    assert list(tmp_path.iterdir()) == before and all(file.read_text() == "before" for file in before)


def test_outputs_that_are_rejected(tmp_path: Path) -> None:
    for name in ("a", "a.jpg", ".npz"):
        with pytest.raises(
            generate.ConfigError, match=r"output must be FILE\.npz, FILE\.png or FOLDER/, got"
        ):
            samples.check_output(name)
    (tmp_path / "mine").write_text("")
    with pytest.raises(
        UserError, match=r"output must be a new or empty folder, got .*, which already exists"
    ):
        samples.check_output(f"{tmp_path}/")
    for name in ("a/", "a.png"):
        samples.check_output(f"{tmp_path}/{name}")
        with pytest.raises(
            generate.ConfigError,
            match=r"output must be FILE\.npz unless samples are images, got samples \[2\]",
        ):
            samples.write(f"{tmp_path}/{name}", 5, in_batches(torch.zeros(5, 2)))
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


# --- ranks -------------------------------------------------------------------------------------------


def test_ranks_share_the_rows() -> None:
    assert [samples.rows_of(7, Ranks(rank, 3)) for rank in range(3)] == [
        range(3),
        range(3, 6),
        range(6, 9),  # the last two are dropped
    ]


def test_ranks_write_what_one_would(tmp_path: Path) -> None:
    """Three rows per rank in batches of two; and a single row, of which the second rank has none."""
    one, two = tmp_path / "one", tmp_path / "two"
    wanted = [("a.npz", 5), ("b/", 5), ("c/", 1)]
    said = write(Ranks(), [(one, *output) for output in wanted], {"batch_size": 4})
    said_by_two = spawn(2, write, [(two, *output) for output in wanted], {"batch_size": 2})
    assert said_by_two == [said, ["", "", ""]]
    with np.load(one / "a.npz") as alone, np.load(two / "a.npz") as together:
        assert alone["samples"].shape == (5, *SHAPE) and alone["samples"].std() > 30
        np.testing.assert_array_equal(together["labels"], alone["labels"])
        # A value halfway between two levels may be rounded to either.
        np.testing.assert_allclose(together["samples"].astype(int), alone["samples"].astype(int), atol=1)
        np.testing.assert_array_equal(pictures(two / "b"), together["samples"])
        np.testing.assert_array_equal(pictures(two / "c"), together["samples"][:1])


def test_labels_are_one_some_in_turn_or_random() -> None:
    key = noise.Draws(0, "test", ["labels"]).at(0)["labels"]

    def read(text: str, n: int = 7) -> list[int]:
        labels: list[int] = generate.read_labels(text, n, 10, key).tolist()
        return labels

    assert read("3") == [3] * 7 and read("1,4-6") == [1, 4, 5, 6, 1, 4, 5]
    many = read("uniform", 1000)
    assert read("uniform") == many[:7] and set(many) == set(range(10))
    for bad in ("10", "4-3", "a", "", "-1", "1;2"):
        with pytest.raises(ConfigError, match=r"labels must be uniform or classes"):
            read(bad)
