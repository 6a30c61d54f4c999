"""`dxmi sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dxmi_ext import cli, ops, tasks
from dxmi_ext.engine.output import samples
from dxmi_ext.two_d import recipe as two_d
from image_runs import run_of_images
from runs import draw, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)
Image = pytest.importorskip("PIL.Image")


def test_sample_is_keyed_by_seed_and_index(finished: Path, tmp_path: Path) -> None:
    samples = draw(finished, tmp_path / "a.npz", "n=50")
    assert samples.shape == (50, 2) and samples.dtype == np.float32
    again = draw(finished, tmp_path / "new" / "b.npz", "n=20", "batch_size=7")
    np.testing.assert_allclose(again, samples[:20], rtol=1e-5, atol=1e-6)
    assert not np.allclose(draw(finished, tmp_path / "c.npz", "n=50", "seed=1"), samples, atol=0.1)


def test_runs_that_ship_are_found_by_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are float16. Outputs go to the current folder, and none to that of the run."""
    safetensors = pytest.importorskip("safetensors.torch")
    shipped = tmp_path / "package/small"
    (shipped / "model").mkdir(parents=True)
    for name in ("config.yaml", "model/config.json"):
        (shipped / name).write_bytes((finished / name).read_bytes())
    weights = safetensors.load_file(finished / "model/model.safetensors")
    halves = {name: weight.half() for name, weight in weights.items()}
    safetensors.save_file(halves, shipped / "model/model.safetensors")
    before = {path: path.stat().st_mtime_ns for path in shipped.rglob("*")}
    monkeypatch.setattr(tasks, "shipped", lambda: {"small": shipped})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "small", "n=20", "device=cpu"]) == 0
    with np.load(tmp_path / "small-samples.npz") as file:
        samples = file["samples"]
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, draw(finished, tmp_path / "a.npz", "n=20"), atol=0.05)
    assert cli.main(["evaluate", "small", "device=cpu", "samplings=1"]) == 0
    assert {path: path.stat().st_mtime_ns for path in shipped.rglob("*")} == before
    assert cli.main(["sample", "smal"]) == 2
    assert (
        "RUN must be the folder of a run, with config.yaml, or one of small, got" in capsys.readouterr().err
    )


def test_sample_guides_and_rejects_labels(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    guided = draw(finished, tmp_path / "a.npz", "n=50", "guidance=.5", "batch_size=30")
    assert "sample: 50/50" in capsys.readouterr().err.splitlines()[-1]
    _, networks = two_d.load(finished, torch.device("cpu"))
    wanted = networks.sampler.sample(50, ops.noise_key(0), guide=networks.guide(0.5))
    np.testing.assert_allclose(guided, wanted, rtol=1e-4, atol=1e-5)
    assert not np.allclose(guided, draw(finished, tmp_path / "b.npz", "n=50"), atol=1e-3)
    assert cli.main(["sample", str(finished), "labels=3"]) == 2
    assert "labels must be null for networks without classes, got '3'" in capsys.readouterr().err


def test_one_run_samples_with_any_of_its_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", "lengths=1,2,5") == 0
    summary = read(tmp_path / "run" / "summary.json")
    assert {"sliced_wasserstein_t1", "sliced_wasserstein_t2"} < summary.keys()
    assert summary["sliced_wasserstein_t5"] == summary["sliced_wasserstein"]
    own, five, two = (
        draw(tmp_path / "run", tmp_path / "a.npz", "n=20", *steps) for steps in ([], ["steps=5"], ["steps=2"])
    )
    np.testing.assert_array_equal(own, five)
    assert not np.allclose(own, two, atol=0.1)
    for arguments, says in (
        (["sample", str(tmp_path / "run"), "steps=3"], "steps must be one of 1, 2, 5, got 3"),
        (["train", "8gaussians", "lengths=1,2"], "lengths must include steps=5, got 1,2"),
        (["train", "8gaussians", "lengths=5,x"], "lengths must be distinct numbers of steps <= 1000"),
        (["train", "8gaussians", "lengths=5,5"], "lengths must be distinct numbers of steps"),
        (["train", "8gaussians", "lengths=5,1001"], "lengths must be distinct numbers of steps"),
        (
            ["train", "8gaussians", "lengths=1,5", "skip_last=1"],
            "lengths must be null with cuda_graph",
        ),
    ):
        assert cli.main(arguments) == 2 and says in capsys.readouterr().err


def test_a_run_of_levels_samples_with_any_number_of_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["lengths=2,5", "step_input=levels", "random_spacing=.5", "untrained_lengths=3"]
    assert train(tmp_path / "run", *asked) == 0
    summary = read(tmp_path / "run" / "summary.json")
    assert {f"sliced_wasserstein_t{steps}" for steps in (2, 3, 5)} < summary.keys()
    five, seven = (draw(tmp_path / "run", tmp_path / "a.npz", "n=20", f"steps={steps}") for steps in (5, 7))
    assert np.isfinite(seven).all() and not np.allclose(five, seven, atol=0.1)
    for arguments, says in (
        (["untrained_lengths=3"], "untrained_lengths must be null with step_input=index, got 3"),
        ([*asked, "untrained_lengths=2"], "untrained_lengths must be distinct numbers of steps <= 1000"),
    ):
        assert cli.main(["train", "8gaussians", *arguments]) == 2 and says in capsys.readouterr().err


def test_points_are_not_drawn_for_pictures(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr(two_d, "sample")
    for output in ("a.png", "a/"):
        assert cli.main(["sample", str(finished), f"output={output}"]) == 2
        assert capsys.readouterr().err == (
            f"dxmi sample: output must be FILE.npz: the run has points, not images, got '{output}'\n"
        )


def test_sample_rejects_another_format(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sample", str(finished), "output=samples.csv", "device=cpu"]) == 2
    assert "output must be FILE.npz, FILE.png or FOLDER/, got 'samples.csv'" in capsys.readouterr().err


def test_sample_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of_images(tmp_path, monkeypatch)
    for output, said in (("a.npz", "samples [3, 3, 8, 8] uint8"), ("b/", "3 pictures"), ("c.png", "a grid")):
        assert cli.main(["sample", str(tmp_path), "n=3", f"output={tmp_path}/{output}", "device=cpu"]) == 0
        assert f"{tmp_path}/{output}: {said}" in capsys.readouterr().out
    samples = np.load(tmp_path / "a.npz")["samples"]
    first = np.asarray(Image.open(tmp_path / "b" / "000000.png"))
    np.testing.assert_array_equal(first.transpose(2, 0, 1), samples[0])
    assert (tmp_path / "c.png").stat().st_size > 0
    assert cli.main(["sample", str(tmp_path), "n=3", f"output={tmp_path}/b/", "device=cpu"]) == 2
    assert "output must be a new or empty folder, got" in capsys.readouterr().err


def test_lack_of_memory_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*_: Any, **__: Any) -> Any:
        yield samples.Batch(torch.empty(2**62, dtype=torch.uint8), None)

    monkeypatch.setattr(two_d, "sample", sample)
    assert cli.main(["sample", str(finished), f"output={tmp_path}/a.npz"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("dxmi sample: out of memory; reduce batches") and out == ""
