"""The command line and a run's folder: files, resuming, refusals, sample, export, evaluate, info and help.

Runs are tiny, evaluated on few points and, but for one, not drawn.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import image_samplers
import runs
from dxmi_ext import __version__, cli, ops, tasks
from dxmi_ext.engine import config, files, plots, samples, steps, terminal
from dxmi_ext.engine.runlog import TIMING_FIELDS, read_metrics
from dxmi_ext.engine.settings import LARGEST_SEED, ConfigError
from dxmi_ext.images import convert, pretrained
from dxmi_ext.images.settings import Config as ImageConfig
from dxmi_ext.images.unet import Architecture, unet
from dxmi_ext.method import generate, noise
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.two_d import densities as data
from dxmi_ext.two_d import plots as point_plots
from dxmi_ext.two_d import recipe as two_d
from runs import DXMI, PRETRAIN, SAMPLE_DATA, SCORES, SETTINGS, assert_same_run, interrupt, model, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)
Image = pytest.importorskip("PIL.Image")

DRAW_PICTURES = two_d.draw_pictures


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with runs.quick():
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run, drawn; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    with runs.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_d, "draw_pictures", DRAW_PICTURES)
        assert train(folder, "tensorboard=true") == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """The same run, free to be changed."""
    return shutil.copytree(finished, tmp_path / "copy")


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Modification time and bytes of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# --- a run's folder ----------------------------------------------------------------------------------


def test_folder_of_a_run(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        *("dxmi.json", "config.yaml", "metrics.jsonl", "summary.json", "checkpoints", "model", "tb"),
        *("samples.png", "energy.png", "paths.png", "curves.png"),
    }
    assert "iterations: 6\n" in (finished / "config.yaml").read_text()
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        *("step_00000008", "step_00000010")
    ]
    assert model(finished).keys() == {"model.safetensors", "config.json"}
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [(row["phase"], row["iteration"]) for row in rows] == [
        *(("pretrain", i + 1) for i in range(PRETRAIN)),
        *(("dxmi", i + 1) for i in range(DXMI)),
    ]


def test_summary_has_the_contracts_keys(finished: Path) -> None:
    summary = read(finished / "summary.json")
    told = {key: summary[key] for key in ("seed", "device", "world_size", "batch_size_per_rank")}
    assert told == {"seed": 0, "device": "cpu", "world_size": 1, "batch_size_per_rank": 16}
    assert summary["resumed_from"] == [] and summary["wall_seconds"] > 0
    assert summary["versions"].keys() >= {"dxmi_ext", "torch", "python"}
    assert all(isinstance(summary[key], float) for key in SCORES)


def test_metrics_tell_each_step_and_the_pace(finished: Path) -> None:
    pretraining, *_, last = (json.loads(line) for line in (finished / "metrics.jsonl").open())
    pace = {"iterations_per_second", "samples_per_second"}
    assert pretraining.keys() == {"phase", "iteration", "loss", "network_failures"} | pace
    assert last.keys() & set(TIMING_FIELDS) == {"iterations_per_second", "samples_per_second"}  # on a CPU
    assert last["samples_per_second"] == pytest.approx(16 * last["iterations_per_second"], rel=1e-3)
    lists = {name: len(value) for name, value in last.items() if isinstance(value, list)}
    per_step = dict.fromkeys(("std", "velocity_var", "sq_displacement", "log_prob", "value_loss"), 5)
    assert lists == per_step | {"sampler_loss": 2}


def test_vectors_are_logged_as_lists() -> None:
    metrics = {"std": torch.tensor([1.0, 2.0]), "failures": torch.zeros(()), "one": torch.tensor([3.0])}
    assert steps.to_host(metrics) == {"std": [1.0, 2.0], "failures": 0.0, "one": [3.0]}


def test_default_folder_and_a_users_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("recipe: mine\ndata: checkerboard\nsteps: 3\npretrained: false\n")
    assert cli.main(["train", "mine.yaml", *SETTINGS]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("mine-") and read(folder / "summary.json")["recipe"] == "mine"
    cfg, networks = two_d.load(folder, torch.device("cpu"))
    assert (cfg.density.data, networks.sampler.steps) == ("checkerboard", 3)
    assert "pretrain" not in (folder / "metrics.jsonl").read_text()


# --- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interruptions", "resumed_from"),
    [
        ([1], [0]),  # before the first checkpoint that is due
        ([3], [2]),  # in pretraining
        ([4], [4]),  # between the phases
        ([9], [8]),  # in DxMI
        ([10], [10]),  # in the evaluation
        ([3, 4], [2, 6]),  # twice: the second run starts at 2 and fails at 6
    ],
)
def test_interrupted_run_ends_as_an_uninterrupted_one(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    interruptions: list[int],
    resumed_from: list[int],
) -> None:
    for step in interruptions:
        interrupt(monkeypatch, step)
        assert train(tmp_path) == 130
        assert "interrupted" in capsys.readouterr().err
        assert not (tmp_path / "summary.json").exists()
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)
    assert read(tmp_path / "summary.json")["resumed_from"] == resumed_from


def test_train_resumes_from_the_command_pretrain(finished: Path, tmp_path: Path) -> None:
    assert train(tmp_path, command="pretrain") == 0
    assert not (tmp_path / "summary.json").exists() and model(tmp_path) != model(finished)
    assert train(tmp_path) == 0
    assert_same_run(tmp_path, finished)


def test_finished_run_says_so_and_changes_nothing(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert train(copy) == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert contents(copy) == before


def test_pretrain_changes_nothing_in_a_finished_run(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert train(copy, command="pretrain") == 0
    assert "finished; nothing to do" in capsys.readouterr().out
    assert contents(copy) == before


def test_finished_run_resumes_to_more_iterations(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, 1)
    assert train(copy, "iterations=8") == 130
    assert not (copy / "summary.json").exists()  # no longer finished
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(copy, "iterations=8") == 0
    summary = read(copy / "summary.json")
    assert (summary["iterations"], summary["resumed_from"]) == (8, [PRETRAIN + DXMI])
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == PRETRAIN + 8


def test_run_resumes_from_a_checkpoint_by_path(finished: Path, copy: Path) -> None:
    assert train(copy, f"resume={copy}/checkpoints/step_00000008") == 0
    assert_same_run(copy, finished)
    assert read(copy / "summary.json")["resumed_from"] == [8]


def test_a_run_that_went_back_resumes_from_there(
    finished: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(monkeypatch, 1)
    assert train(copy, f"resume={copy}/checkpoints/step_00000008") == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(copy) == 0
    assert_same_run(copy, finished)
    assert set(read(copy / "summary.json")["resumed_from"]) == {8}


def test_a_run_that_resumes_from_another_folder_logs_its_own_lines(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a new folder, and in that of a run whose lines are of other lengths."""
    for _ in range(2):
        assert train(tmp_path, "seed=1", f"resume={finished}/checkpoints/step_00000008") == 0
        rows = read_metrics(tmp_path / "metrics.jsonl")
        assert [(row["phase"], row["iteration"]) for row in rows] == [("dxmi", 5), ("dxmi", 6)]
        assert "lost lines" not in capsys.readouterr().err
        assert train(tmp_path, "seed=1", "resume=never") == 0


def test_resume_never_starts_from_scratch(finished: Path, copy: Path) -> None:
    assert train(copy, "resume=never", "tau=0.2") == 0
    assert read(copy / "summary.json")["resumed_from"] == []
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == PRETRAIN + DXMI
    assert model(copy) != model(finished)
    assert train(copy, "resume=never") == 0
    assert_same_run(copy, finished)


def test_pictures_while_training_change_nothing_and_are_the_same_after_an_interruption(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def energy(file: Any, energies: torch.Tensor, points: torch.Tensor, **_: Any) -> None:
        file.write(points.numpy().tobytes())  # drawing takes long

    monkeypatch.setattr(point_plots, "energy", energy)
    monkeypatch.setattr(point_plots, "samples", lambda file, data, points: energy(file, data, points))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "picture_every=3") == 0
    interrupt(monkeypatch, 10)  # sees data of the picture in pretraining too
    assert train(parts, "picture_every=3") == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(parts, "picture_every=3") == 0
    pictures = [{p.name: p.read_bytes() for p in (f / "pictures").iterdir()} for f in (whole, parts)]
    assert pictures[0].keys() == {"pretrain_00000003.png", "dxmi_00000003.png", "dxmi_00000006.png"}
    assert pictures[0] == pictures[1] and len(set(pictures[0].values())) == 3
    assert model(whole) == model(parts) == model(finished)
    assert cli.main(["report", str(parts)]) == 0
    assert "dxmi_00000006" in Page(parts / "report.html").text
    assert train(whole, "picture_every=0", "resume=never") == 0
    assert not (whole / "pictures").exists()


def test_a_second_process_in_a_folder_is_rejected(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with files.lock(copy / ".lock"):
        before = contents(copy)
        assert train(copy, "resume=never") == 2
        assert "another process is at work in this folder" in capsys.readouterr().err
        assert contents(copy) == before
    assert train(copy, "resume=never") == 0
    assert not (copy / ".lock").exists()


# --- numbers at their limits ---------------------------------------------------------------------------


def test_the_largest_seed_trains_to_the_end(tmp_path: Path) -> None:
    seed = LARGEST_SEED
    assert train(tmp_path, f"seed={seed}", "samplings=2") == 0
    assert read(tmp_path / "summary.json")["seed"] == seed
    assert draw(tmp_path, tmp_path / "a.npz", "n=2", f"seed={seed}").shape == (2, 2)


def test_lack_of_memory_is_one_line(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def sample(*_: Any, **__: Any) -> Any:
        yield samples.Batch(torch.empty(2**62, dtype=torch.uint8), None)

    monkeypatch.setattr(two_d, "sample", sample)
    assert cli.main(["sample", str(finished), f"output={tmp_path}/a.npz"]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith("dxmi sample: out of memory; reduce batches") and out == ""


# --- mistakes of the user ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("tau=0.2", "tau must be 0.1 as in the run"),
        ("seed=1", "seed must be 0 as in the run"),
        ("batch_size=8", "batch_size must be 16 as in the run"),
        ("pretrain_iterations=5", "pretrain_iterations must be 4 as in the run"),
        ("resume=nowhere", "nowhere"),
        ("sigma_min=4", "sigma_min must be > 0 and < sigma_max=3.0, got 4.0"),
    ],
)
def test_rejected_in_the_folder_of_a_run(
    copy: Path, capsys: pytest.CaptureFixture[str], setting: str, says: str
) -> None:
    before = contents(copy)
    assert train(copy, setting) == 2
    assert says in capsys.readouterr().err
    assert contents(copy) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "8gaussians", "iteration=3"], "iteration: unknown key; did you mean iterations?"),
        (["train", "8gaussians", "iterations=many"], "iterations must be int, got 'many'"),
        (["train", "elsewhere/mine.yaml"], "recipe must be one of 2spirals, 8gaussians"),
        (["train", "8gaussians", "tau=-1"], "tau must be >= 0, got -1.0"),
        (["sample", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["evaluate", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["report", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["export", "nowhere"], "RUN must be the folder of a run, with config.yaml"),
        (["convert", "nowhere", "kind=edm"], "nowhere"),
        (["train", "~nobody-of-that-name/a.yaml"], "RECIPE must not begin with ~ where its home folder is"),
        (["train", "8gaussians", "seed=2**64"], "seed must be int, got '2**64'"),
        (["sample", ".", "n=10000000000000"], "n must be <= 100000000, got 10000000000000"),
    ],
)
def test_mistake_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    out, err = capsys.readouterr()
    assert err.startswith(f"dxmi {arguments[0]}: {says}") and err.count("\n") == 1 and out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_recipes_nearest_name_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "8gaussian"]) == 2
    assert capsys.readouterr().err.endswith(", got '8gaussian'; did you mean 8gaussians?\n")


def test_a_missing_module_of_a_users_task_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("task_that_is_broken.py").write_text("import no_such_library.part\n")
    Path("mine.yaml").write_text("task: task_that_is_broken\n")
    assert cli.main(["train", "mine.yaml"]) == 2
    assert capsys.readouterr().err == "dxmi train: module no_such_library is not installed\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["--version"])
    assert (exit.value.code, capsys.readouterr().out) == (0, f"dxmi_ext {__version__}\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "8gaussians", "--seed", "3"], "--seed is not an option; write a setting as seed=3"),
        (
            ["train", "--batch-size=64", "8gaussians"],
            "--batch-size is not an option; write a setting as batch_size=64",
        ),
        (
            ["train", "8gaussians", "--output", "a=3"],
            "--output is not an option; write a setting as output=VALUE",
        ),
        (["train", "8gaussians", "-s", "4"], "-s is not an option; write a setting as seed=3"),
        (["train", "8gaussians", "--dry"], "--dry is not an option; write a setting as dry=VALUE"),
        (["info", "x"], "unexpected argument 'x'"),
        (["train"], "RECIPE is missing; see dxmi train --help"),
    ],
)
def test_mistake_in_flags_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (exit.value.code, out, err) == (2, "", f"dxmi {arguments[0]}: {says}\n")


# --- terminals, names and pipes ----------------------------------------------------------------------


def test_a_terminal_without_utf8_shows_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, shown in (("ascii", b"1 +- 2 \xe9 ?\n"), ("utf-8", "1 ± 2 ".encode() + b"\xe9 \xc4\xb1\n")):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", stream)
        terminal.accept_any_text()
        print("1 ± 2 \udce9 \u0131", flush=True)
        assert stream.buffer.getvalue() == shown  # type: ignore[attr-defined]


def test_a_run_in_a_folder_whose_name_is_not_utf8(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    interrupt(monkeypatch, 9)
    assert train(folder) == 130
    monkeypatch.setattr(data, "sample", SAMPLE_DATA)
    assert train(folder) == 0
    assert_same_run(folder, finished)
    assert read(folder / "summary.json")["resumed_from"] == [8]
    assert draw(folder, folder / "a.npz", "n=3").shape == (3, 2)
    assert cli.main(["evaluate", str(folder), f"output={folder}/a.json"]) == 0
    assert cli.main(["report", str(folder)]) == 0
    assert "caf\\udce9" in Page(folder / "report.html").text


def test_a_closed_pipe_ends_a_command_quietly() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dxmi_ext.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (terminal.HUNG_UP, b"")


# --- dry run, report ---------------------------------------------------------------------------------


def test_typed_settings_without_effect_are_noted_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Not those of the recipe, whose tau_margin belongs to the tau_rate that is replaced."""
    typed = ["tau_rate=0", "length_draw=short", "tau_hold=.2"]
    assert cli.main(["train", "8gaussians-auto", *SETTINGS, *typed, "--dry-run"]) == 0
    assert capsys.readouterr().err == (
        "note: tau_hold has no effect without tau_rate > 0 or tau_cooling < 1; "
        "length_draw has no effect without lengths\n"
    )


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_dry_run_tries_each_phase_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([command, "8gaussians", "--dry-run", *SETTINGS, "tau=0.2", "sampler_width=10"]) == 0
    out, err = capsys.readouterr()
    assert list(tmp_path.iterdir()) == [] and err == ""
    assert "tau: 0.2\n" in out and "iterations: 6\n" in out and "dry_run: false\n" in out
    # step embedding, first layer, two hidden layers, last layer, log sigma
    assert f"sampler: {5 * 10 + 3 * 10 + 2 * 110 + 11 * 2 + 5} parameters" in out and "value: " in out
    phases = [line for line in out.splitlines() if "one iteration" in line]
    assert [line.split(":")[0] for line in phases] == ["pretrain", "dxmi"][: 1 + (command == "train")]
    assert all("loss " in line and "MiB" in line for line in phases)


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_dry_run_leaves_a_run_alone(copy: Path, capsys: pytest.CaptureFixture[str], resume: str) -> None:
    before = contents(copy)
    other = ["tau=0.2"] if resume == "never" else []
    assert train(copy, "--dry-run", f"resume={resume}", *other) == 0
    assert "dxmi: one iteration" in capsys.readouterr().out
    assert contents(copy) == before


class Page(HTMLParser):
    """What a page says, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text, self.tags, self.sources = "", set[str](), list[str]()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_report_has_everything_in_one_page(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(copy)]) == 0
    assert capsys.readouterr().out == f"{copy}/report.html\n"
    page = Page(copy / "report.html")
    assert "Finished: 6 iterations" in page.text and "sampler_width: 128" in page.text
    assert f"{read(copy / 'summary.json')['auroc']:.4g}" in page.text
    assert len(page.sources) == 4 and "While training" not in page.text  # curves, energy, paths, samples
    pictures = [base64.b64decode(source.removeprefix("data:image/png;base64,")) for source in page.sources]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    assert {(copy / f"{name}.png").read_bytes() for name in ("energy", "paths", "samples")} < set(pictures)


def test_report_of_an_unfinished_run_with_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "<b>&"
    interrupt(monkeypatch, PRETRAIN + 1)
    assert train(folder, "recipe=<script>") == 130
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "dxmi", "itera')  # torn
    assert cli.main(["report", str(folder), f"output={tmp_path}/page.html"]) == 0
    page = Page(tmp_path / "page.html")
    assert "Not finished: last logged at iteration 1 of dxmi." in page.text and len(page.sources) == 1
    assert "recipe: <script>" in page.text and not page.tags & {"script", "b"}
    (folder / "metrics.jsonl").unlink()
    assert cli.main(["report", str(folder)]) == 0
    assert "nothing logged yet" in Page(folder / "report.html").text


# --- sample, evaluate, info, help --------------------------------------------------------------------


def draw(folder: Path, output: Path, *settings: str) -> np.ndarray:
    assert cli.main(["sample", str(folder), f"output={output}", "device=cpu", *settings]) == 0
    with np.load(output) as file:
        assert file.files == ["samples"]
        samples: np.ndarray = file["samples"]
    return samples


def test_sample_is_keyed_by_seed_and_index(finished: Path, tmp_path: Path) -> None:
    samples = draw(finished, tmp_path / "a.npz", "n=50")
    assert samples.shape == (50, 2) and samples.dtype == np.float32
    again = draw(finished, tmp_path / "new" / "b.npz", "n=20", "batch_size=7")
    np.testing.assert_allclose(again, samples[:20], rtol=1e-5, atol=1e-6)
    assert not np.allclose(draw(finished, tmp_path / "c.npz", "n=50", "seed=1"), samples, atol=0.1)


def test_runs_that_ship_are_found_by_name(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights are halves, nothing is written to its folder, and outputs go to the current one."""
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
    asked = ["lengths=2,5", "step_input=levels", "length_draw=short", "untrained_lengths=3"]
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


def test_images_are_a_grid_of_their_pixels(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 2.0]).view(3, 1, 1, 1).expand(3, 3, 4, 5)
    plots.images(tmp_path / "a.png", images, columns=2)
    pixels = np.asarray(Image.open(tmp_path / "a.png"))
    assert pixels.shape == (2 + 2 * 6, 2 + 2 * 7, 3)
    assert (pixels[2:6, 2:7] == 0).all() and (pixels[2:6, 9:14] == 128).all()
    assert (pixels[8:12, 2:7] == 255).all() and (pixels[:2] == 255).all()
    for bad in (images[0], images[:0], images[:, :2]):
        with pytest.raises(ValueError, match=r"images must be \[n, C, H, W\] .* got shape"):
            plots.images(tmp_path / "b.png", bad)


@pytest.mark.parametrize("command", ["sample", "evaluate", "export"])
def test_a_run_that_is_not_finished_is_one_line(
    copy: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copy / "model")
    assert cli.main([command, str(copy)]) == 2
    wanted = f"dxmi {command}: RUN must be a finished run, got {str(copy)!r}, which has no model/\n"
    assert capsys.readouterr().err == wanted


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


def run_of_images(
    folder: Path, patch: pytest.MonkeyPatch, *, trains_sampler: bool = True, classes: int | None = None
) -> GaussianSampler:
    """Makes a run of a task that has nothing but tiny networks."""
    pytest.importorskip("diffusers")
    network = unet(Architecture(8, (1, 2), blocks=1, attention=()), image_samplers.SHAPE, classes)
    networks = image_samplers.make_networks(network)

    def sample(_: Path, rows: range, seed: int, batch_size: int | None, device: Any, **options: Any) -> Any:
        return generate.batches(networks, rows, seed, batch_size=batch_size, **options)

    cfg = ImageConfig.of({"recipe": "tiny", "data": "/home/me/images", "tau": 0.2})
    if not trains_sampler:
        cfg.put("negatives", "short_run")
    task = SimpleNamespace(load=lambda *_: (cfg, networks), sample=sample)
    patch.setattr(tasks, "task_of", lambda _: task)
    (folder / "config.yaml").write_text("task: images\n")
    (folder / "model").mkdir(exist_ok=True)
    return networks.sampler


def test_export_is_a_pipeline_of_the_runs_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sampler = run_of_images(tmp_path, monkeypatch)
    assert cli.main(["export", str(tmp_path), "license=cc-by-4.0"]) == 0
    out = capsys.readouterr().out
    assert ".unfinished" not in "".join(p.read_text() for p in (tmp_path / "diffusers").rglob("*.json"))
    _, loading, drawing = out.splitlines()
    drawing = drawing.replace("batch_size=16", "2, key=key, output_type='raw'")
    names: dict[str, Any] = {"key": ops.noise_key(3)}
    exec(f"{loading}\n{drawing}", names)
    torch.testing.assert_close(names["images"], sampler.sample(2, names["key"]))
    before = contents(tmp_path)
    assert cli.main(["export", str(tmp_path)]) == 2
    assert "output must be a new or empty folder, got" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_export_has_a_model_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its front matter is the Hub's; paths of the machine are not on it."""
    yaml = pytest.importorskip("yaml")
    run_of_images(tmp_path, monkeypatch)
    about = {"recipe": "tiny", "seed": 3, "iterations": 9, "wall_seconds": 1.5, "versions": {}}
    about |= {"device": "cpu", "resumed_from": []}
    numbers = {"fd_8": 12.345, "thing": {"auroc": 0.5}}
    (tmp_path / "summary.json").write_text(json.dumps(about | numbers))
    assert cli.main(["export", str(tmp_path), "license=cc-by-4.0"]) == 0
    card = (tmp_path / "diffusers" / "README.md").read_text(encoding="utf-8")
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "license": "cc-by-4.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dxmi", "diffusers", "image-generation", "few-step-diffusion"],
    }
    assert "| fd_8 | 12.35 |" in text and "| thing.auroc | 0.5 |" in text and "wall_seconds" not in text
    assert "recipe `tiny`" in text and "tau: 0.2\n" in text and "from `images`" in text
    assert "/home/me" not in text and str(tmp_path) not in text


class FakeHub:
    """Stands for huggingface_hub.HfApi."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.calls, self.files = error, [], {}  # type: ignore[var-annotated]

    def create_repo(self, repo: str, **options: Any) -> str:
        self.calls.append((repo, options))
        if self.error is not None:
            raise self.error
        return f"https://hub/{repo}"

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> None:
        self.calls.append((repo_id, commit_message))
        found = (path for path in folder_path.rglob("*") if path.is_file())
        self.files = {path.relative_to(folder_path).as_posix(): path.read_bytes() for path in found}


def test_push_uploads_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run_of_images(tmp_path, monkeypatch)
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    before = contents(tmp_path)
    assert cli.main(["push", str(tmp_path), "repo=me/mine", "private=true", "message=first"]) == 0
    assert capsys.readouterr().out == "https://hub/me/mine\n"
    assert fake.calls == [("me/mine", {"private": True, "exist_ok": True}), ("me/mine", "first")]
    assert contents(tmp_path) == before
    files = {"README.md", "model_index.json", "pipeline.py", "scheduler/scheduler_config.json"}
    assert files | {"unet/config.json", "unet/diffusion_pytorch_model.safetensors"} == fake.files.keys()
    assert 'DxMIPipeline.from_pretrained("me/mine")(batch_size=16)' in fake.files["README.md"].decode()
    index = json.loads(fake.files["model_index.json"])
    # Where a repository's components are not diffusers' own, DiffusionPipeline does not download it.
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers"}


def test_push_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run_of_images(tmp_path, monkeypatch)
    for settings, error, says in (
        ([], None, "repo must be OWNER/NAME, got none"),
        (["repo=mine"], None, "repo must be OWNER/NAME of the repository on the Hub; required, got 'mine'"),
        (["repo=me/mine"], hub.errors.LocalTokenNotFoundError(), "the Hub requires a login"),
        (["repo=me/mine"], ConnectionError("no\nroute"), "me/mine: no route"),
    ):
        monkeypatch.setattr(hub, "HfApi", lambda error=error: FakeHub(error))
        assert cli.main(["push", str(tmp_path), *settings]) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("dxmi push: ") and says in printed and printed.count("\n") == 1


def test_export_says_what_is_missing(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", str(finished), f"output={tmp_path}/a"]) == 2
    assert capsys.readouterr().err == (
        "dxmi export: RUN must have the sampler of a U-Net, got that of SamplerMLP, "
        "which diffusers does not know\n"
    )
    run_of_images(tmp_path, monkeypatch, trains_sampler=False)
    assert cli.main(["export", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"dxmi export: RUN must have a trained sampler, got '{tmp_path}'\n"
    run_of_images(tmp_path, monkeypatch, classes=10)
    assert cli.main(["export", str(tmp_path)]) == 0
    assert "(batch_size=2, class_labels=[0, 1]).images" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "dxmi_ext.pipeline", raising=False)
    monkeypatch.delattr("dxmi_ext.pipeline", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["export", str(tmp_path), f"output={tmp_path}/a"]) == 2
    assert capsys.readouterr().err == "dxmi export requires diffusers: pip install 'dxmi_ext[images]'\n"
    assert not (tmp_path / "a").exists()


def test_convert_makes_a_folder_of_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a network becomes is told by test_convert.py."""
    given: list[Any] = []
    monkeypatch.setattr(convert, "_read", lambda path: {"read": path})
    monkeypatch.setattr(convert, "from_consistency", lambda state, **options: given.append((state, options)))
    monkeypatch.setattr(pretrained, "save", lambda _, path, scheduler: given.append((path, scheduler)))
    checkpoint, settings = tmp_path / "ct.pt", ["kind=consistency", "image_size=16"]
    assert cli.main(["convert", str(checkpoint), *settings, "head_channels=8"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path}/ct: a UNet2DModel of diffusers")
    assert given == [
        ({"read": checkpoint}, {"image_size": 16, "head_channels": 8}),
        (tmp_path / "ct", convert.KINDS["consistency"]),
    ]
    (tmp_path / "ct").write_text("mine")
    for mistake, says in (
        (settings, f"output must be a new or empty folder, got '{tmp_path}/ct', which already exists"),
        (["image_size=16"], "kind must be one of edm, consistency, consistency-teacher, got none"),
        (["kind=ddpm"], "kind must be one of edm, consistency, consistency-teacher, got 'ddpm'"),
    ):
        assert cli.main(["convert", str(checkpoint), *mistake]) == 2
        assert capsys.readouterr().err.startswith(f"dxmi convert: {says}")


def test_evaluate_gives_the_runs_own_numbers(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "numbers.json"
    assert cli.main(["evaluate", str(finished), f"output={output}", "device=cpu"]) == 0
    summary = read(finished / "summary.json")
    wanted = {"generator": "dxmi_ext", **{key: summary[key] for key in SCORES}}
    assert read(output) == pytest.approx(wanted)
    table = capsys.readouterr().out
    assert "8gaussians, T = 5, tau = 0.1, pretrained" in table and "the paper" in table
    assert f"{summary['sliced_wasserstein']:.3f}" in table and f"{summary['auroc']:.3f}" in table
    assert cli.main(["evaluate", str(finished), f"output={output}", "device=cpu", "samplings=1"]) == 0
    assert read(output)["sliced_wasserstein_std"] == 0  # of one
    options = ["device=cpu", "samplings=1", "log_partition=true", "paths=500"]
    for _ in range(2):  # the second overwrites the first
        assert cli.main(["evaluate", str(finished), f"output={output}", *options]) == 0
    assert {"log_partition", "log_partition_std", "log_partition_grid", "log_likelihood"} <= read(
        output
    ).keys()
    assert "backward kernel" in capsys.readouterr().out


def test_kl_with_an_automatic_tau_uses_its_last_value(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, output = tmp_path / "run", tmp_path / "numbers.json"
    assert train(folder, "tau_rate=.5", "samplings=2") == 0
    assert "tau = 0.1, then automatic" in capsys.readouterr().out
    factor = read(folder / "model/config.json")["tau_factor"]
    assert factor == pytest.approx(read_metrics(folder / "metrics.jsonl")[-1]["temperature"]) and factor != 1
    cfg, networks = two_d.load(folder, torch.device("cpu"))
    divergences = [
        two_d.evaluate_networks(cfg, networks, seed=0, tau_factor=each)["energy_kl"] for each in (factor, 1.0)
    ]
    summary = read(folder / "summary.json")
    assert divergences[0] == pytest.approx(summary["energy_kl"]) and divergences[0] != divergences[1]
    assert cli.main(["evaluate", str(folder), f"output={output}", "device=cpu"]) == 0
    wanted = {"generator": "dxmi_ext", **{key: summary[key] for key in SCORES}}
    assert read(output) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("settings", "title", "paper"),
    [
        ("tau=1", "T = 5, tau = 1, pretrained", "1.030"),
        ("tau_entropy=1 tau_velocity=1", "T = 5, tau = 1, pretrained", "1.030"),
        ("tau_entropy=.5", "T = 5, tau = 0.5 and 0.1, pretrained", None),
        ("tau_rate=.1", "T = 5, tau = 0.1, then automatic, pretrained", None),
    ],
)
def test_a_runs_row_names_its_taus(settings: str, title: str, paper: str | None) -> None:
    cfg = config.load(two_d.Config, None, settings.split())
    text = two_d.table(cfg, dict.fromkeys(SCORES, 0.5))
    assert title in text and (("the paper" not in text) if paper is None else paper in text)


def test_info_tells_versions_and_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split("  ")[0] for line in lines} >= {"dxmi_ext", "torch", "CPU kernels", "CUDA kernels"}


def test_help_lists_every_key_with_meaning_and_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "8gaussians", "--help"]) == 0
    out = capsys.readouterr().out
    for name, key in two_d.Config.keys().items():
        assert f"  {name}=" in out and key.metadata["help"] in out
    assert "recipe=8gaussians" in out
    for command, key in (
        *(("sample", "batch_size=null"), ("evaluate", "seed=0"), ("report", "output=null")),
        *(
            ("export", "output=null"),
            ("push", "repo=null"),
            ("convert", "(edm | consistency | consistency-teacher)"),
        ),
        *(("pretrain", "8gaussians"), ("train", "--dry-run")),
    ):
        assert cli.main([command, "--help"]) == 0
        assert key in capsys.readouterr().out


def test_module_as_a_command(finished: Path, tmp_path: Path) -> None:
    """In processes of their own: exit statuses, and the same samples."""

    def dxmi(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dxmi_ext.cli", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)

    mistake = dxmi("train", "8gaussians", "iteration=3")
    assert (mistake.returncode, mistake.stdout) == (2, "") and "did you mean iterations?" in mistake.stderr
    sample = dxmi("sample", str(finished), "n=5", "output=a.npz", "device=cpu")
    assert sample.returncode == 0, sample.stderr
    with np.load(tmp_path / "a.npz") as file:
        np.testing.assert_allclose(file["samples"], draw(finished, tmp_path / "b.npz", "n=5"), rtol=1e-5)
