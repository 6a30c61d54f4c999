"""Commands overwrite only their own folders and files, and keep all others."""

from __future__ import annotations

import errno
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import rank_processes
import runs
from dxmi_ext import cli
from dxmi_ext.engine import run
from dxmi_ext.engine.output import plots, samples
from dxmi_ext.engine.runs import config, identity, report, run_folder
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint, files, folders
from dxmi_ext.engine.storage.folders import FolderError
from dxmi_ext.images import recipe as images
from dxmi_ext.two_d import plots as point_plots
from dxmi_ext.two_d import recipe as two_d
from runs import train

for library in ("matplotlib", "sklearn", "tensorboard", "yaml"):
    pytest.importorskip(library)

FOREIGN = {
    "model/net.py": "net",
    "pictures/holiday.png": "holiday",
    "tb/events.old": "old",
    "checkpoints/best.pt": "best",
    "config.yaml": "lr: 0.1\ntask: images of cats\n",
    "summary.json": "",
    "metrics.jsonl": "epoch 1\n",
}
OTHERS = [
    *("model/notes.txt", "model/sub/notes.txt", "checkpoints/best.pt", "checkpoints/step_00000004/mine.txt"),
    *("checkpoints/step_00000010/mine.txt", "pictures/holiday.png", "pictures/sub/dxmi_00000003.png"),
    *(
        "tb/events.old",
        "wandb/offline-run/run.wandb",
        "thesis.unfinished",
        "notes.previous",
        "data.removed/x",
    ),
    *("samples.npz", "summary.json.bak"),
]


@pytest.fixture(autouse=True)
def quick() -> Iterator[None]:
    with runs.quick():
        yield


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    """A copy of that run, which tests may modify."""
    return shutil.copytree(finished, tmp_path / "copy")


def write(folder: Path, content: dict[str, str]) -> Path:
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("dxmi ") and error.count("\n") == 1
    return error


# --- folders of others -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "key"),
    [
        (["train", "8gaussians", *runs.SETTINGS], "output"),
        (["train", "8gaussians", *runs.SETTINGS, "resume=never"], "output"),
        (["train", "8gaussians", *runs.SETTINGS, "dry_run=true"], "output"),
        (["pretrain", "8gaussians", *runs.SETTINGS], "output"),
        (["train", "fashion-mnist-t4", "data=nowhere"], "output"),  # before the data are read
        (["reproduce", "table1", "work=work"], "output"),
        (["reproduce", "table1", "output=output"], "work"),
        (["sample", "RUN"], "output"),
        (["score", "RUN", "RUN"], "output"),
        (["export", "RUN"], "output"),
        (["convert", "RUN/model/model.safetensors", "kind=edm"], "output"),
        (["report", "RUN"], "output"),
        (["evaluate", "RUN"], "output"),
    ],
)
def test_a_folder_of_others_is_rejected_before_anything_is_written(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    key: str,
) -> None:
    write(tmp_path / "proj", FOREIGN)
    monkeypatch.chdir(tmp_path)
    before = contents(tmp_path)
    given = [text.replace("RUN", str(finished)) for text in command]
    assert cli.main([*given, f"{key}=proj{'/' * (command[0] == 'sample')}"]) == 2
    error = one_line(capsys)
    if command[0] not in ("score", "export"):  # these require another kind of run first
        assert key in error and "proj" in error
    assert contents(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["proj"]


@pytest.mark.parametrize(
    ("content", "passes"),
    [
        ({}, True),
        (
            {".lock": "", "config.yaml.unfinished": "", "dxmi.json.unfinished": ""},
            True,
        ),  # a kill at the start
        ({".lock": "mine"}, False),
        ({"a.txt": ""}, False),
        ({"config.yaml": "task: two_d\nrecipe: a\n", "checkpoints/a": ""}, False),  # lacks keys of a run
        ({"dxmi.json": '{"kind": "run", "format": 1}', "a.txt": ""}, True),
        ({"dxmi.json": '{"kind": "run", "format": 2}'}, False),
        ({"dxmi.json": '{"kind": "scores", "format": 1}'}, False),
        ({"dxmi.json": ""}, False),
        ({"dxmi.json": "[1]"}, False),
    ],
)
def test_folders_that_a_run_may_use(tmp_path: Path, content: dict[str, str], passes: bool) -> None:
    write(tmp_path, content)
    if passes:
        folders.check(tmp_path, "run", folders.is_unmarked_run)
    else:
        with pytest.raises(FolderError, match="must"):
            folders.check(tmp_path, "run", folders.is_unmarked_run)


def test_a_run_from_before_there_were_marks_resumes_and_is_marked(copy: Path) -> None:
    (copy / "dxmi.json").unlink()
    before = contents(copy)
    assert train(copy) == 0 and contents(copy) == before  # it is finished already
    assert train(copy, "iterations=8") == 0
    assert folders.read(copy) == {"kind": "run", "format": 1}
    assert runs.read(copy / "summary.json")["resumed_from"] == [runs.PRETRAIN + runs.DXMI]


def test_a_newer_format_is_rejected(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "dxmi.json").write_text('{"kind": "run", "format": 2}')
    before = contents(copy)
    for command in ("sample", "evaluate", "report", "export"):
        assert cli.main([command, str(copy)]) == 2
        assert "format must be at most 1, got 2" in one_line(capsys)
    assert train(copy) == 2 and "format must be at most 1, got 2" in one_line(capsys)
    assert contents(copy) == before


@pytest.mark.parametrize("command", ["sample", "evaluate", "score", "report", "export"])
def test_a_folder_without_a_run_is_an_error_in_one_line(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, FOREIGN)
    assert cli.main([command, str(tmp_path)]) == 2
    assert "RUN must be the folder of a run" in one_line(capsys)


def test_ranks_fail_alike(tmp_path: Path) -> None:
    write(tmp_path / "proj", FOREIGN)
    first, second = rank_processes.spawn(2, rank_processes.refused_run, tmp_path / "proj")
    assert first == second and "output must be a new folder" in first
    (tmp_path / "run").mkdir()
    with files.lock(tmp_path / "run/.lock"):
        first, second = rank_processes.spawn(2, rank_processes.refused_run, tmp_path / "run")
    assert first == second and "another process is at work" in first


# --- files of others in a run's folder ---------------------------------------------------------------


@pytest.mark.parametrize("settings", [["resume=never"], ["iterations=8", "keep_checkpoints=1"]])
def test_files_of_others_stay(copy: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(point_plots, "energy", lambda file, *_, **__: file.write(b"picture"))
    write(copy, {name: name for name in OTHERS})
    assert train(copy, "tensorboard=true", "picture_every=6", *settings) == 0
    assert {name: (copy / name).read_text() for name in OTHERS} == {name: name for name in OTHERS}
    steps = [p.name for p in (copy / "checkpoints").iterdir() if files.holds(p, folders.CHECKPOINT)]
    assert "step_00000004" not in steps
    assert train(copy, "tensorboard=true", "picture_every=6", "resume=never") == 0  # again
    assert {name: (copy / name).read_text() for name in OTHERS} == {name: name for name in OTHERS}
    ours = {p.name for p in (copy / "tb").iterdir()} - {"events.old"}
    assert len(ours) == 1 and all(name.startswith("events.out.tfevents.") for name in ours)


def test_a_crash_between_two_renames_loses_no_other_file(tmp_path: Path) -> None:
    for suffix in (".previous", ".removed"):
        old = {f"model{suffix}/config.json": "old", f"model{suffix}/mine.txt": suffix}
        write(tmp_path, old | {"model/config.json": "new"})
        files.tidy(tmp_path, folders.RUN)
    assert contents(tmp_path) == {
        "model/config.json": b"new",
        "model/mine.txt": b".previous",
        "model/mine.txt.1": b".removed",
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("summary.json", ""), ("summary.json", "[]"), ("summary.json", '{"iterations": 6}')),
        *(
            ("failure.json", '{"a": 1}'),
            ("metrics.jsonl", '{"phase": 1}\n[]\n'),
            ("metrics.jsonl", "\0\xff\n"),
        ),
        *(("config.yaml", ""), ("config.yaml", '{"iterations": 6}'), ("config.yaml", "\0\xff")),
    ],
)
def test_damaged_files_give_no_traceback(
    copy: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "summary.json").unlink()
    (copy / name).write_text(text, encoding="latin-1")
    for command in ("report", "sample"):
        status = cli.main([command, str(copy), *["n=2", "device=cpu"] * (command == "sample")])
        assert status == 0 or (name == "config.yaml" and str(copy) in one_line(capsys))
        capsys.readouterr()
    if train(copy) == 0:
        assert runs.read(copy / "summary.json")["iterations"] == runs.DXMI
    else:
        assert name == "config.yaml" and str(copy) in one_line(capsys)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("steps: 5", "steps: 4"),
        ("value_width: 128", "value_width: 64"),
        ("value_kind: per_step", "value_kind: separate"),
        ("data: 8gaussians", "data: 3"),
        ("recipe: 8gaussians", "recipe: [1, 2]"),
        ("task: two_d", "task: {}"),
        ("task: two_d", "task: images"),
        ("seed: 0", "sead: 0"),
    ],
)
def test_an_edited_config_is_one_line(
    copy: Path, was: str, now: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy / "config.yaml"
    assert was in path.read_text()
    path.write_text(path.read_text().replace(was, now))
    for command in ("sample", "evaluate"):
        assert cli.main([command, str(copy), "device=cpu"]) == 2
        assert str(copy) in one_line(capsys)


# --- files -------------------------------------------------------------------------------------------


def test_files_that_may_be_overwritten(tmp_path: Path, finished: Path) -> None:
    drawn = samples.Batch(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    samples.write(str(tmp_path / "ours.npz"), 3, [drawn])
    np.savez(tmp_path / "theirs.npz", samples=np.zeros(3), labels=np.zeros(3))
    plots.images(tmp_path / "ours.png", torch.zeros(1, 1, 2, 2))
    point_plots.samples(tmp_path / "theirs.png", torch.zeros(3, 2), torch.zeros(3, 2))
    (tmp_path / "ours.html").write_text(report.page("a", "b", "c"))
    (tmp_path / "old.html").write_text(report.page("a", "b", "c").replace(folders.GENERATOR, ""))
    (tmp_path / "theirs.html").write_text("<!doctype html>\n<title>a</title>")
    odd = {"kernel": "fitted", "true": None, "w2": math.inf, "classes": {"a": 1}}
    (tmp_path / "ours.json").write_text(json.dumps(folders.NUMBERS_ENTRY | odd))
    shutil.copy(finished / "summary.json", tmp_path / "theirs.json")
    (tmp_path / "numbers.json").write_text('{"auroc": 0.9}')
    kinds = {".npz": folders.is_samples, ".png": folders.is_picture, ".html": folders.is_page}
    kinds[".json"] = folders.is_numbers
    for path in sorted(tmp_path.iterdir()):
        for suffix, is_ours in kinds.items():
            assert is_ours(path) == (path.stem in ("ours", "old") and path.suffix == suffix)
    (tmp_path / "empty").touch()
    folders.check_file(tmp_path / "empty", folders.is_page, "a page")
    folders.check_file(tmp_path / "new/er/a", folders.is_page, "a page")
    for name in (".", "theirs.html", "empty/a", "/dev/null"):
        with pytest.raises(FolderError, match="output must be a new file or a page, got"):
            folders.check_file(tmp_path / name, folders.is_page, "a page")


def test_a_link_to_a_file_keeps_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("disk/a")
    (tmp_path / "disk").mkdir()
    with files.file(tmp_path / "link") as file:
        file.write(b"a")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk/a").read_bytes() == b"a"


@pytest.mark.parametrize(
    ("command", "name", "settings"),
    [("sample", "a.npz", ["n=2"]), ("evaluate", "a.json", ["samplings=1"]), ("report", "a.html", [])],
)
def test_commands_overwrite_only_their_own_files(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str,
    name: str,
    settings: list[str],
) -> None:
    output = tmp_path / "new" / name
    settings = [*settings, *["device=cpu"] * (command != "report")]
    for _ in range(2):
        assert cli.main([command, str(finished), f"output={output}", *settings]) == 0
    capsys.readouterr()
    output.write_text("mine")
    assert cli.main([command, str(finished), f"output={output}", *settings]) == 2
    assert f"got '{output}', which has other content" in one_line(capsys)
    assert output.read_text() == "mine"


def test_paths_of_settings_become_absolute_also_in_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("inception.pth").touch()
    given = ["features=efflite0, inception.pth,missing.pth", "start=none", "cache=."]
    cfg = config.load(images.Config, None, given)
    identity.make_paths_absolute(cfg)
    assert cfg.evaluation.features == f"efflite0,{tmp_path}/inception.pth,missing.pth"
    assert (cfg.flat()["start"], cfg.source.cache) == ("none", str(tmp_path))


# --- names -------------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    write(Path("runs"), {"8gaussians-now": "a file"})
    names = list[str]()

    def start(opened: run.Run) -> None:
        with opened:
            names.append(str(opened.directory))

    both = [run.Run(runs.config_of(Path("x"), "output=null", "device=cpu")) for _ in range(2)]
    assert {str(each.directory) for each in both} == {"runs/8gaussians-now-2"}  # neither exists yet
    for each in both:
        thread = threading.Thread(target=start, args=(each,))
        thread.start()
        thread.join()
    assert names == ["runs/8gaussians-now-2", "runs/8gaussians-now-3"]
    assert [runs.config.peek(Path(name, "config.yaml"), "output") for name in names] == names
    assert Path("runs/8gaussians-now").read_text() == "a file"


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    assert cli.main(["train", "anomaly", f"data={tmp_path}/none", f"output={tmp_path}/run"]) == 2
    assert "does not exist" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("marked", "old", "new", "refusal"),
    [
        (True, None, "cats", None),
        (True, "cats", "dogs", "whose train split has another fingerprint"),
        (True, "dogs", None, "whose train split has another fingerprint"),  # replaced in place
        (False, "cats", "cats", None),
        (False, "cats", "dogs", "whose train split has another fingerprint"),
        (False, None, "cats", "has no fingerprint of its data"),
        (False, "dogs", None, None),  # an older run, without fingerprints
    ],
)
def test_a_run_knows_its_data(
    tmp_path: Path, marked: bool, old: str | None, new: str | None, refusal: str | None
) -> None:
    """The data were cats; `old` is what lies at their path now, `new` what lies at the path given instead."""
    write(tmp_path, {"a": "cats"} | ({} if new is None else {"b": new}))

    def start(data: str) -> None:
        cfg = images.Config().replace(
            recipe="r", task="images", output=str(tmp_path / "run"), data=f"{tmp_path}/{data}"
        )
        with run.Run(cfg, data=lambda path: {"train": Path(path).read_text()}):
            pass

    start("a")
    write(tmp_path, {"run/model/config.json": "{}"})
    assert identity.data_of(tmp_path / "run") == {"train": "cats"}
    if not marked:
        (tmp_path / "run/dxmi.json").unlink()
    (tmp_path / "a").unlink()
    write(tmp_path, {} if old is None else {"a": old})
    if refusal is None:
        start("a" if new is None else "b")
        assert identity.data_of(tmp_path / "run") == {"train": new or old}
    else:
        before = contents(tmp_path)
        with pytest.raises(ConfigError, match=refusal):
            start("a" if new is None else "b")
        assert contents(tmp_path) == before


def test_names_of_2d_data_are_not_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("checkerboard").touch()
    cfg = runs.config_of(tmp_path / "run", "data=checkerboard")
    run.Run(cfg)
    assert cfg.density.data == "checkerboard"


def test_a_checkpoint_with_files_of_others_is_none_once_it_is_pruned(tmp_path: Path) -> None:
    for iteration in range(3):
        checkpoint.save(tmp_path, iteration, {"i": iteration}, keep=2)
        (tmp_path / f"step_{iteration:08d}" / "mine.txt").touch()
    assert [path.name for path in (tmp_path / "step_00000000").iterdir()] == ["mine.txt"]
    assert checkpoint.load_latest(tmp_path, pytest.fail, until=0) is None
    checkpoint.save(tmp_path, 0, {"i": 3}, keep=1)
    assert contents(tmp_path).keys() >= {f"step_{i:08d}/mine.txt" for i in range(3)}
    found = checkpoint.load_latest(tmp_path, pytest.fail)
    assert found is not None and found[1] == {"i": 3}


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with files.lock(tmp_path / "a"), files.locked(tmp_path / "b"):
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


def test_settings_that_are_not_yaml_name_the_file(tmp_path: Path) -> None:
    write(tmp_path, {"config.yaml": "steps: many\n"})
    with pytest.raises(ConfigError, match=rf"{tmp_path}/config\.yaml: steps must be an integer, got 'many'"):
        identity.settings_of(two_d.Config, tmp_path)
