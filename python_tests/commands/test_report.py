"""`dxmi report`."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from dxmi_ext import cli
from report_page import Page
from runs import PRETRAIN, interrupt, read, train

for library in ("matplotlib", "yaml", "sklearn", "tensorboard"):
    pytest.importorskip(library)


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
