"""`dxmi export`, `dxmi push` and `dxmi convert`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi_ext import cli, ops, tasks
from dxmi_ext.images.networks import convert, pretrained
from image_runs import run_of_images
from runs import contents

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


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
    """Its front matter has the Hub's format; it contains no local paths."""
    yaml = pytest.importorskip("yaml")
    run_of_images(tmp_path, monkeypatch)
    about = {"recipe": "tiny", "seed": 3, "iterations": 9, "wall_seconds": 1.5, "versions": {}}
    about |= {"device": "cpu", "resumed_from": []}
    numbers = {"fd_8": 12.345, "thing": {"auroc": 0.5}}
    (tmp_path / "summary.json").write_text(json.dumps(about | numbers))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", ".", "license=cc-by-4.0"]) == 0
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
    assert f"\n# {tmp_path.name}\n" in text
    assert "/home/me" not in text and str(tmp_path) not in text


def test_a_run_that_ships_has_its_license_by_any_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of_images(tmp_path, monkeypatch)
    monkeypatch.setattr(tasks, "shipped", lambda: {"tiny": tmp_path})
    monkeypatch.chdir(tmp_path.parent)
    assert cli.main(["export", tmp_path.name]) == 0
    assert "license: mit\n" in (tmp_path / "diffusers" / "README.md").read_text(encoding="utf-8")


class FakeHub:
    """A stand-in for huggingface_hub.HfApi."""

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
    # DiffusionPipeline does not download a repository whose components are not diffusers' own.
    assert {value[0] for value in index.values() if isinstance(value, list)} == {"diffusers"}


def test_push_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = pytest.importorskip("huggingface_hub")
    run_of_images(tmp_path, monkeypatch)
    for settings, error, says in (
        ([], None, "repo must be OWNER/NAME, got null"),
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
        "dxmi export: RUN must have a sampler with a U-Net, got one with a SamplerMLP, "
        "which diffusers does not support\n"
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
    """The conversion of networks is tested in test_convert.py."""
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
        (["image_size=16"], "kind must be one of edm, consistency, consistency-teacher, got null"),
        (["kind=ddpm"], "kind must be one of edm, consistency, consistency-teacher, got 'ddpm'"),
    ):
        assert cli.main(["convert", str(checkpoint), *mistake]) == 2
        assert capsys.readouterr().err.startswith(f"dxmi convert: {says}")
