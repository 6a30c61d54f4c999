"""`dxmi reproduce`: units, which of them are run again, stops, tables. Runs are tiny."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import reproduce_command
import runs
from dxmi_ext import cli, tasks
from dxmi_ext.engine.storage import folders
from dxmi_ext.images import recipe as images
from dxmi_ext.reproduce import command as reproduce_module
from dxmi_ext.reproduce import computing, plots, table, units, workers
from dxmi_ext.reproduce.command import EXPERIMENTS
from dxmi_ext.reproduce.experiments import Experiment, Row
from dxmi_ext.reproduce.units import Unit
from dxmi_ext.two_d import recipe as two_d
from dxmi_ext.two_d.evaluation import PAPER
from dxmi_ext.two_d.plots import grid
from runs import interrupt, read

for library in ("matplotlib", "yaml", "sklearn"):
    pytest.importorskip(library)

GALLERY = plots.gallery


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(EXPERIMENTS, "tiny", reproduce_command.TINY)
    monkeypatch.setattr(plots, "gallery", lambda file, _: file.write(b"picture"))
    with runs.quick():
        yield


def reproduce(folder: Path, *settings: str, rows: str = "a,b") -> int:
    places = f"output={folder}/results", f"work={folder}/work"
    return cli.main(["reproduce", "tiny", *places, f"rows={rows}", "seeds=1", "workers=1", *settings])


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "results").glob("*.json")}


def test_every_row_is_a_run_of_its_own() -> None:
    for experiment in EXPERIMENTS.values():
        names = [row.name for row in experiment.rows]
        assert len(names) == len(set(names))
        for row in experiment.rows:
            real, quick = (Unit(row, 3, short, Path("a"), Path("b")).config() for short in (False, True))
            assert (real.run.seed, real.run.threads, real.run.output) == (3, 1, f"b/{row.name}-seed3")
            assert quick.run.iterations == real.run.iterations // 10
            assert quick.run.pretrain_iterations == real.run.pretrain_iterations // 10


def test_table1_has_the_papers_rows() -> None:
    rows = EXPERIMENTS["table1"].rows
    assert [row.paper["sliced_wasserstein"][0] for row in rows] == [
        *(0.967, 0.824, 0.241, 0.123, 0.074, 0.074, 0.068, 1.030, 0.076)
    ]
    configs = [Unit(row, 0, False, Path(), Path()).config() for row in rows]
    assert [cfg.chain.steps for cfg in configs] == [5, 10, 100, 1000, 5, 5, 5, 5, 5]
    assert [(cfg.run.pretrained, cfg.algorithm.tau) for cfg in configs[4:]] == list(PAPER)
    assert all(two_d.build(cfg, torch.device("cpu"))[0].sampler.steps == cfg.chain.steps for cfg in configs)


PLAIN = str(Path(__file__).parents[1] / "images/plain.yaml")
START = Row("start", "", {"iterations": 0, "pretrain_iterations": 3000}, recipe=PLAIN)
TUNED = Row("tuned", "", {}, recipe=PLAIN, start=START)
CHAIN = Row("ddim-100", "", {}, recipe=PLAIN, start=START, chain="ddim-100")


def test_rows_start_from_another_rows_run(tmp_path: Path) -> None:
    """That run comes first unless it exists, and others wait for it; a unit's identity has no paths."""

    def unit(row: Row, **where: Any) -> Unit:
        return Unit(row, 0, False, tmp_path / "results", tmp_path / "work", **where)

    tuned, chain = unit(TUNED), unit(CHAIN)
    ordered = reproduce_module._with_starts([tuned, chain])
    assert [each.name for each in ordered] == ["start-seed0", "tuned-seed0", "ddim-100-seed0"]
    assert workers._ready(ordered, []) is ordered[0]
    assert workers._ready(ordered[1:], ordered[:1]) is None
    assert workers._ready(ordered[1:], []) is tuned
    (ordered[0].folder / "model").mkdir(parents=True)
    assert reproduce_module._with_starts([tuned])[1:] == [tuned]  # its settings are unknown
    (ordered[0].folder / "unit.json").write_text(json.dumps(ordered[0].identity()))
    assert reproduce_module._with_starts([tuned]) == [tuned]
    assert tuned.config().networks.start == str(ordered[0].folder)
    assert unit(TUNED, data="elsewhere").config().source.data == "elsewhere"
    identity = unit(TUNED, data="elsewhere").identity()
    assert identity == tuned.identity() and identity["start"] == "start"
    assert identity["start.pretrain_iterations"] == 3000  # it determines the start
    assert str(tmp_path) not in json.dumps(identity)
    assert chain.identity()["chain"] == "ddim-100"


def test_a_row_may_evaluate_a_chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    threads: list[int] = []
    monkeypatch.setattr(computing.torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(computing.torch, "set_num_threads", threads.append)

    def evaluate(directory: Path, settings: Any, _: torch.device) -> tuple[dict[str, float], str]:
        asked.append((directory, settings.chain, settings.n, settings.picture))
        assert threads == [1]
        return {"fd_efflite0_2500": 1.5}, ""

    monkeypatch.setattr(images, "evaluate", evaluate)
    unit = Unit(CHAIN, 0, False, tmp_path / "results", tmp_path / "work")
    assert computing.compute(unit)["numbers"] == {"fd_efflite0_2500": 1.5} and units.read(unit) is not None
    assert unit.start is not None and threads == [1, 3]  # restored
    assert asked == [(unit.start.folder, "ddim-100", 2500, str(unit.folder / "samples.png"))]


def test_a_finished_unit_is_kept_and_a_damaged_one_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plots, "gallery", GALLERY)
        assert reproduce(tmp_path) == 0
    results = tmp_path / "results"
    assert {path.name for path in results.iterdir()} == {
        *("a-seed0.json", "b-seed0.json", "README.md", "tiny.png")
    }
    a, b = read(results / "a-seed0.json"), read(results / "b-seed0.json")
    assert a["numbers"].keys() == {*runs.SCORES} and a["settings"]["batch_size"] == 16
    assert b["numbers"].keys() == {*runs.SCORES} - {"auroc", "auroc_std", "energy_kl"}  # it has no energy
    assert a["machine"]["threads"] == 1 and a["versions"]["torch"] == torch.__version__
    page = (results / "README.md").read_text()
    assert f"| DxMI | {a['numbers']['sliced_wasserstein']:.3f} |" in page and "(tiny.png)" in page
    before = stamps(tmp_path)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(computing, "compute", lambda _: pytest.fail("run again"))
        assert reproduce(tmp_path) == 0
    assert stamps(tmp_path) == before and "2 units, 2 done" in capsys.readouterr().out
    assert (results / "tiny.png").read_bytes().startswith(b"\x89PNG")  # drawn once
    # The table has all seeds that exist.
    (results / "a-seed7.json").write_text(json.dumps({**a, "seed": 7}))
    assert reproduce(tmp_path, rows="b") == 0
    (line,) = (line for line in (results / "README.md").read_text().splitlines() if "| DxMI |" in line)
    assert line.endswith("| 2 |") and "± 0.000" in line
    # The figure is drawn again, but not with fewer rows than before.
    (results / "b-seed0.json").unlink()
    assert reproduce(tmp_path) == 0 and (results / "tiny.png").read_bytes() == b"picture"
    (results / "tiny.png").write_bytes(b"of both")
    (tmp_path / "work" / "a-seed0" / "model").rename(tmp_path / "model")
    (results / "b-seed0.json").unlink()
    assert reproduce(tmp_path) == 0 and (results / "tiny.png").read_bytes() == b"of both"
    assert "the networks or pictures of a are not in" in capsys.readouterr().err
    before = stamps(tmp_path)
    # Damaged: cut off, of another seed, without numbers. The run still exists, so the numbers are the same.
    whole = (results / "a-seed0.json").read_text()
    for damaged in (whole[:-20], whole.replace('"seed": 0', '"seed": 1'), json.dumps({**a, "numbers": {}})):
        (results / "a-seed0.json").write_text(damaged)
        assert reproduce(tmp_path) == 0
        assert "it is run again" in capsys.readouterr().err
        assert read(results / "a-seed0.json") == a
        assert stamps(tmp_path)["b-seed0.json"] == before["b-seed0.json"]


def test_a_row_of_other_settings_is_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = Row("a", "DxMI", reproduce_command.LENGTH | {"iterations": 2})
    unit = Unit(row, 0, False, tmp_path / "results", tmp_path / "work")
    was = computing.compute(unit)
    assert units.read(unit) is not None
    assert reproduce(tmp_path, rows="a") == 0
    assert "made with iterations=2, now 60; it is run again" in capsys.readouterr().err
    now = read(unit.path)
    assert (was["settings"]["iterations"], now["settings"]["iterations"]) == (2, 60)
    assert read(unit.folder / "summary.json")["resumed_from"] == []
    # A setting that is missing in the json had its default.
    del now["settings"]["velocity_decay"]
    unit.path.write_text(json.dumps(now))
    before = stamps(tmp_path)
    assert reproduce(tmp_path, rows="a") == 0 and stamps(tmp_path) == before


def test_a_unit_does_not_depend_on_what_it_does_not_use(tmp_path: Path) -> None:
    pretrained = reproduce_command.LENGTH | {"iterations": 0}

    def unit(**settings: Any) -> Unit:
        row = Row("a", "DDPM", pretrained | settings)
        return Unit(row, 0, False, tmp_path / "results", tmp_path / "work")

    computing.compute(unit())
    assert units.read(unit(tau=0.3, value_width=64)) is not None
    for changed in ({"pretrain_lr": 1e-3}, {"iterations": 2}, {"compile": True}):
        with pytest.raises(units.UnusableUnit, match=f"made with {next(iter(changed))}="):
            units.read(unit(**changed))
    fixed, automatic = (unit(iterations=2, tau_rate=rate, tau_margin=0.7).identity() for rate in (0, 0.01))
    of_rate = {"tau_margin", "tau_hold"}
    assert not of_rate & fixed.keys() and of_rate <= automatic.keys() and automatic["tau_margin"] == 0.7


def test_a_run_of_another_experiment_is_taken_over(tmp_path: Path) -> None:
    def unit(name: str, experiment: str, seed: int = 0, **settings: Any) -> Unit:
        row = Row(name, "DxMI", reproduce_command.LENGTH | {"iterations": 2} | settings)
        return Unit(row, seed, False, tmp_path / experiment, tmp_path / "work")

    found = computing.compute(unit("a", "first"))
    (tmp_path / "second").mkdir()
    for other in (unit("b", "second", gamma=0.5), unit("b", "second", seed=1)):
        assert units.adopt(other, ["auroc"]) is None
    same = unit("b", "second")
    assert units.adopt(same, ["auroc", "not told"]) is None and units.read(same) is None
    assert units.adopt(same, ["auroc"]) == tmp_path / "first" / "a-seed0.json"
    assert units.read(same) == found | {"row": "b", "taken_from": "first/a-seed0.json"}


def test_quick_units_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, "--quick", rows="a") == 0
    assert read(tmp_path / "results" / "a-seed0.json")["settings"]["iterations"] == 6
    assert (tmp_path / "work" / "a-seed0-quick").is_dir()
    assert "with a tenth of the iterations" in (tmp_path / "results" / "README.md").read_text()
    before = stamps(tmp_path)
    for rows in ("a", "b"):  # b before its run, which may take hours
        assert reproduce(tmp_path, rows=rows) == 2
        assert "which holds units with quick=true" in capsys.readouterr().err
        assert stamps(tmp_path) == before


def test_an_interrupted_unit_resumes(tmp_path: Path) -> None:
    assert reproduce(tmp_path / "whole", rows="a") == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt(patch, 50)  # after the pretraining
        assert reproduce(tmp_path / "cut", rows="a") == 130
    assert stamps(tmp_path / "cut") == {}
    assert reproduce(tmp_path / "cut", rows="a") == 0
    whole, cut = (read(tmp_path / name / "results" / "a-seed0.json") for name in ("whole", "cut"))
    assert cut["resumed_from"] == [40] and cut["numbers"] == whole["numbers"]


def test_a_run_that_fails_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert reproduce(tmp_path, rows="bad,b") == 2
    assert "dxmi reproduce: 1 of 2 runs failed:\nbad-seed0: dxmi " in capsys.readouterr().err
    assert stamps(tmp_path).keys() == {"b-seed0.json"}


def test_a_run_may_diverge_where_that_is_a_result(tmp_path: Path) -> None:
    for name, settings, diverged in (("bad", {"value_lr": 1e30, "rollbacks": 0}, 1), ("fine", {}, 0)):
        row = Row(name, name, reproduce_command.LENGTH | {"iterations": 30} | settings, may_diverge=True)
        unit = Unit(row, 0, False, tmp_path / "results", tmp_path / "work")
        numbers = computing.compute(unit)["numbers"]
        assert numbers["diverged"] == diverged and ("auroc" in numbers) == (not diverged)
        assert (units.read(unit) or {})["numbers"] == numbers


def test_processes_run_side_by_side_and_stop_by_a_signal(tmp_path: Path) -> None:
    """Of three runs, one ends, one diverges, and one is stopped, as `dxmi train` would be."""
    command = [sys.executable, reproduce_command.__file__, "reproduce", "tiny", f"output={tmp_path}/results"]
    command += [f"work={tmp_path}/work", "workers=3", "seeds=1", "rows=a,bad,endless"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        told = ""
        while not ("a-seed0: done" in told and "bad-seed0: exit status 1" in told):
            told += (line := process.stderr.readline())
            assert line, told
        endless = tmp_path / "work" / "endless-seed0"
        while not runs.untimed(endless):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        told += process.communicate()[1]
    assert process.returncode == 143 and "stopped; to resume: dxmi reproduce tiny" in told
    assert stamps(tmp_path).keys() == {"a-seed0.json"}
    assert "| DxMI |" in (tmp_path / "results" / "README.md").read_text()
    assert "bad-seed0: dxmi" in (tmp_path / "work" / "bad-seed0.log").read_text()
    last = json.loads(runs.untimed(endless)[-1])
    saved = max(int(path.name.removeprefix("step_")) for path in (endless / "checkpoints").glob("step_*"))
    assert saved == 40 * (last["phase"] == "dxmi") + last["iteration"] and not (endless / ".lock").exists()


def test_table_of_fixed_units() -> None:
    def unit(sw: float, seed: int = 0, data: str = "8gaussians", **numbers: float) -> dict[str, Any]:
        floor = 0.05 + 0.02 * seed
        return {
            "seed": seed,
            "settings": {"data": data},
            "numbers": {"sliced_wasserstein": sw, "sliced_wasserstein_floor": floor, **numbers},
            "versions": {"torch": "2.13", "dxmi_ext": "0.1"},
            "machine": {"processor": "a processor", "threads": 1},
            "seconds": 100 * sw,
        }

    rows = [
        Row("x", "first", {}, {"sliced_wasserstein": (0.1, 0.02), "auroc": (0.9, None)}),
        *(Row("y", "second", {}), Row("z", "third", {})),
        Row("w", "in the second's runs", {}, of="y", prefix="w_"),
        Row("v", "without runs", {}),
    ]
    found = {"x": [unit(0.1, auroc=0.8), unit(0.3, 1, auroc=0.9)], "y": [unit(0.5, w_auroc=0.7)]}
    found["z"] = [unit(0.2, data="2spirals")]
    page = table.markdown(Experiment("name", "Title", rows, notes="Notes."), found, figures=["name.png"])
    assert page.splitlines() == [
        *("# Title", ""),
        "|  | SW | the paper | AUROC | the paper | KL | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| first | 0.200 ± 0.141 | 0.100 ± 0.020 | 0.850 ± 0.071 | 0.900 |  | 2 |",
        "| second | 0.500 |  |  |  |  | 1 |",
        "| third | 0.200 |  |  |  |  | 1 |",
        "| in the second's runs |  |  | 0.700 |  |  | 1 |",
        *(
            "",
            "Mean ± standard deviation over seeds; the runs of a row differ only in their seeds.",
            "",
            "Notes.",
            "",
        ),
        *("Rows without runs: `v`.", ""),
        *(
            "SW of fresh data: 0.060 ± 0.014 (8gaussians), 0.050 (2spirals).",
            "",
            "![name](name.png)",
            "",
        ),
        *("- 4 runs on a processor, 1 thread per run, torch 2.13, dxmi_ext 0.1; 10 to 50 s each", ""),
        "Made by `dxmi reproduce name`, from the json files in this folder.",
    ]


_COMMITTED = [
    "fashion-mnist",
    "energies",
    "anomaly",
    "magnetic-tiles",
    "surfaces",
    "temperature",
    "refinements",
]


@pytest.mark.parametrize("name", _COMMITTED)
def test_committed_units_are_done_and_hold_no_paths(name: str) -> None:
    results = Path(__file__).parents[2] / "docs/results" / name
    rows = {row.name: row for row in EXPERIMENTS[name].rows}
    found = sorted(results.glob("*-seed0.json"))
    assert found
    for path in found:
        unit = Unit(rows[path.stem.removesuffix("-seed0")], 0, False, results, Path("nowhere"))
        assert units.read(unit) is not None and "/" not in str(list(unit.identity().values()))
        assert '": "/' not in path.read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_committed_pages_are_up_to_date(name: str) -> None:
    """If this fails, `dxmi reproduce NAME` with the existing rows rewrites the page."""
    experiment, results = EXPERIMENTS[name], Path(__file__).parents[2] / "docs/results" / name
    page = (results / table.PAGE).read_text(encoding="utf-8")
    assert page.startswith(f"# {experiment.title}\n") and experiment.notes in page
    for row in experiment.rows:
        made = any(results.glob(f"{row.of or row.name}-seed*.json"))
        assert f"| {row.label} |" in page if made else f"`{row.name}`" in page


def test_a_chain_of_a_run_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without a start evaluates the start of its recipe; other weights make another unit."""
    row = next(row for row in EXPERIMENTS["fashion-mnist"].rows if row.chain == "heun-18")
    unit = Unit(row, 0, False, tmp_path / "results", tmp_path / "work")
    ships = tasks.shipped()["fashion-mnist-base"]
    assert unit.evaluated == ships and unit.identity()["chain"] == "heun-18"
    weights = unit.identity()["start.weights"]
    (tmp_path / "other/model").mkdir(parents=True)
    (tmp_path / "other/model/model.safetensors").write_bytes(b"")
    monkeypatch.setattr(tasks, "shipped", lambda: {"fashion-mnist-base": tmp_path / "other"})
    assert unit.identity()["start.weights"] != weights


def test_a_unit_has_the_fingerprint_of_its_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate(*_: Any) -> tuple[dict[str, float], str]:
        return {"fd_efflite0_2500": 1.5}, ""

    monkeypatch.setattr(images, "evaluate", evaluate)
    unit = Unit(CHAIN, 0, False, tmp_path / "results", tmp_path / "work", data="/mnt/clothes")
    assert unit.start is not None
    unit.start.folder.mkdir(parents=True)
    folders.mark(unit.start.folder, "run", data={"train": "abc"})
    computing.compute(unit)
    assert read(unit.path)["data"] == {"name": "clothes", "fingerprints": {"train": "abc"}}
    assert "/mnt" not in unit.path.read_text() and units.read(unit) is not None


def test_figures_are_of_the_data_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other data are prepared and trained on again, but not in the folder of units of the first data."""
    prepared: list[str] = []

    def prepare(data: str | None, folder: Path) -> None:
        assert data is not None and not any(folder.iterdir())
        prepared.append(Path(data).name)
        rng = np.random.default_rng(len(prepared))
        good, test = rng.normal(size=(60, 4)), rng.normal(size=(20, 4)) + np.arange(20)[:, None] % 2
        np.savez(folder / "v.npz", X_train=good, X_test=test, y_test=np.arange(20) % 2)

    settings = {"data": "v.npz", "detector": "knn", "baselines": "none", "preparation": "unit"}
    row = Row("row", "Row", settings, recipe="anomaly-vectors")
    columns = {"image_auroc": "AUROC"}
    tiny = Experiment("tiny", "Tiny", [row], columns, prepare=prepare, summary=lambda *_: "")
    monkeypatch.setitem(EXPERIMENTS, "tiny", tiny)
    for name in ("first", "second"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "file").write_text(name)

    def auroc(output: str, *settings: str) -> float:
        places = f"output={tmp_path / output}", f"work={tmp_path / 'work'}"
        assert cli.main(["reproduce", "tiny", *places, "seeds=1", "workers=1", *settings]) == 0
        number: float = read(tmp_path / output / "row-seed0.json")["numbers"]["image_auroc"]
        return number

    of_first = auroc("results", f"data={tmp_path / 'first'}")
    (tmp_path / "first").rename(tmp_path / "moved")
    assert auroc("results", f"data={tmp_path / 'moved'}") == auroc("again") == of_first
    assert prepared == ["first"]
    capsys.readouterr()
    given = [f"output={tmp_path / 'results'}", f"work={tmp_path / 'work'}", f"data={tmp_path / 'second'}"]
    assert cli.main(["reproduce", "tiny", *given]) == 2
    assert "output must be another folder, got" in (told := capsys.readouterr().err)
    assert told.endswith("whose row-seed0.json was made from other data\n") and prepared == ["first"]
    assert auroc("others", f"data={tmp_path / 'second'}") != of_first and prepared == ["first", "second"]


def test_a_units_run_replaces_nothing_of_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The work folder is ours, but a folder in it, with the name of a unit, is not."""
    assert reproduce(tmp_path, rows="b") == 0
    mine = tmp_path / "work/a-seed0/mine.txt"
    mine.parent.mkdir()
    mine.touch()
    assert reproduce(tmp_path, rows="a") == 2
    assert "work must be a new folder, an empty one or that of a run" in capsys.readouterr().err
    (mine.parent / "unit.json").write_text('{"recipe": "8gaussians"}')  # of an older version
    assert reproduce(tmp_path, rows="a") == 0 and mine.exists()


def test_gallery_is_drawn(tmp_path: Path) -> None:
    energies = grid(20).square().sum(dim=1)
    models = [("one", torch.randn(9, 2), energies), ("two", torch.randn(9, 2), None)]
    GALLERY(tmp_path / "a.png", models * 6)  # in two rows
    assert (tmp_path / "a.png").stat().st_size > 1000
    plots.grids(tmp_path / "b.png", [("again", tmp_path / "a.png")] * 5)
    assert (tmp_path / "b.png").stat().st_size > 1000


def test_a_run_without_its_picture_is_absent_from_the_figure(tmp_path: Path) -> None:
    """A run has none if it could not be drawn."""
    row = next(row for row in EXPERIMENTS["energies"].rows if row.name == "gmm25-dxmi-t20")
    unit = Unit(row, 0, False, tmp_path, tmp_path)
    (unit.folder / "model").mkdir(parents=True)
    assert table.figure(tmp_path / "a.png", EXPERIMENTS["energies"], [unit]) == [row.name]
    (unit.folder / "samples.png").write_bytes(b"picture")
    assert table.figure(tmp_path / "a.png", EXPERIMENTS["energies"], [unit]) == []
    assert (tmp_path / "a.png").read_bytes() == b"picture"


def test_an_error_of_a_file_stops_no_other_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []

    def compute(unit: Unit) -> None:
        if unit.row.name == "a":
            raise PermissionError("no")
        computed.append(unit.row.name)

    monkeypatch.setattr(computing, "compute", compute)
    missing = [Unit(Row(name, "", {}), 0, False, tmp_path, tmp_path) for name in "ab"]
    assert workers.run(missing, 1) == ["a-seed0: no"] and computed == ["b"]


def test_sweeps_of_fixed_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "sweep", lambda file, *what: drawn.append(what))
    rows = [Row(name, name.upper(), {}) for name in "abc"]
    found = {
        "a": [{"numbers": {"sliced_wasserstein": 0.1}}, {"numbers": {"sliced_wasserstein": 0.3}}],
        "c": [{"numbers": {"sliced_wasserstein": 2.0, "auroc": 0.9}}],
    }
    experiment = Experiment("name", "Title", rows, sweeps={"ac": "ac", "ab": "ab", "cba": "cba"})
    pictures = table.sweeps(tmp_path, experiment, found)  # b has no units yet
    assert [path.name for path in pictures] == ["name-ac.png", "name-cba.png"]
    assert drawn == [
        (["A", "C"], {"SW": [[0.1, 0.3], [2.0]], "AUROC": [[], [0.9]]}),
        (["C", "B", "A"], {"SW": [[2.0], [], [0.1, 0.3]], "AUROC": [[0.9], [], []]}),
    ]


def test_pictures_of_sweeps_have_a_panel_a_number(tmp_path: Path) -> None:
    plots.sweep(
        tmp_path / "a.png", ["1", "2", "3"], {"SW": [[0.1, 0.3], [], [2.0]], "AUROC": [[0.9], [], []]}
    )
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_every_sweep_is_of_rows() -> None:
    for experiment in EXPERIMENTS.values():
        names = {row.name for row in experiment.rows}
        assert all(names >= set(rows) for rows in experiment.sweeps.values())
        assert not names & experiment.sweeps.keys()
        assert names >= set(experiment.shown)


def test_help_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["reproduce", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name}" in out for name in EXPERIMENTS) and "  workers=0" in out
    assert "; 2 rows" in next(line for line in out.splitlines() if "  magnetic-tiles" in line)
    assert cli.main(["reproduce", "table1", "--help"]) == 0
    assert "ddpm-t1000" in capsys.readouterr().out
    given = ["data=x", f"work={tmp_path}", f"output={tmp_path}"]
    for arguments, says in (
        (["densities", *given], "data must not be given for densities"),
        (["energies", *given], "data must not be given for energies"),
        (["surfaces", *given], "data must be a file or folder, got 'x', which does not exist"),
        (["table2"], "experiment must be one of table1, "),
        (["tiny", "seed=1"], "seed: unknown key; did you mean seeds?"),
        (["tiny", f"work={tmp_path}", f"output={tmp_path}", "rows=a,bd"], "rows must be names of"),
    ):
        assert cli.main(["reproduce", *arguments]) == 2
        assert capsys.readouterr().err.startswith(f"dxmi reproduce: {says}")
