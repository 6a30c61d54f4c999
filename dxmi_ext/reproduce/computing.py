"""The computation of a unit: its run, or the evaluation of another's network. Imports ``reproduce.units``."""

from __future__ import annotations

import platform
import time
from pathlib import Path, PurePath
from typing import Any

import torch

from dxmi_ext.engine.compute.device import choose, versions
from dxmi_ext.engine.learning import health
from dxmi_ext.engine.output.runlog import write_json
from dxmi_ext.engine.runs.identity import data_of, summary_of
from dxmi_ext.engine.storage import folders
from dxmi_ext.reproduce.units import Unit, holds_another, is_folder_of_unit, write_identity

_OF_ENERGIES = ("auroc", "auroc_std", "energy_kl")


def compute(unit: Unit) -> dict[str, Any]:
    """Runs or resumes a unit, and writes its json.

    Raises:
        health.Diverged: the run diverged.
        signals.Stopped: on SIGTERM or Ctrl-C; the run is saved.
    """
    cfg = unit.config()
    folders.check(unit.folder, "run", is_folder_of_unit, key="work")
    unit.folder.mkdir(parents=True, exist_ok=True)
    folders.mark(unit.folder, "run")
    if holds_another(unit):
        folders.clear(unit.folder)
    write_identity(unit)
    found = {
        "row": unit.row.name,
        "seed": unit.seed,
        "quick": unit.quick,
        "settings": unit.identity(),
        **(_evaluated(unit, cfg) if unit.row.chain else _trained(unit, cfg)),
    }
    if prints := data_of(unit.evaluated if unit.row.chain else unit.folder):
        source = {} if unit.source is None else {"source": unit.source}
        found["data"] = {"name": PurePath(cfg.flat()["data"]).name, "fingerprints": prints, **source}
    if unit.row.may_diverge:
        found["numbers"] = {"diverged": 0.0} | found["numbers"]
    unit.output.mkdir(parents=True, exist_ok=True)
    write_json(unit.path, found)
    return found


def _trained(unit: Unit, cfg: Any) -> dict[str, Any]:
    """Trains a unit and returns the run's numbers and machine."""
    started = time.monotonic()
    try:
        unit.task.train(cfg)
    except health.Diverged:
        if not unit.row.may_diverge:
            raise
        return _here(cfg.run.device, cfg.run.threads, started) | {"numbers": {"diverged": 1.0}}
    summary = summary_of(unit.folder)
    numbers = {key: value for key, value in summary.items() if isinstance(value, float)}
    seconds = numbers.pop("wall_seconds")
    if not cfg.run.iterations:  # no energy has been trained
        numbers = {key: value for key, value in numbers.items() if key not in _OF_ENERGIES}
    return {
        "numbers": numbers,
        "versions": summary["versions"],
        "machine": {"processor": processor(summary["device"]), "threads": cfg.run.threads},
        "seconds": seconds,
        "resumed_from": summary["resumed_from"],
    }


def _evaluated(unit: Unit, cfg: Any) -> dict[str, Any]:
    """`_trained` for a unit that evaluates the network of another."""
    started, threads = time.monotonic(), torch.get_num_threads()
    settings = unit.task.EvaluateSettings(
        seed=unit.seed,
        n=cfg.evaluation.evaluate_n,
        chain=unit.row.chain,
        data=unit.data,
        picture=str(unit.folder / "samples.png"),
    )
    device = choose(cfg.run.device)
    torch.set_num_threads(cfg.run.threads or threads)
    try:
        numbers, _ = unit.task.evaluate(unit.evaluated, settings, device)
    finally:
        torch.set_num_threads(threads)
    return _here(str(device), cfg.run.threads, started) | {"numbers": numbers}


def _here(device: str, threads: int, started: float) -> dict[str, Any]:
    """The fields of a json about this run and machine, without numbers."""
    return {
        "versions": versions(),
        "machine": {"processor": processor(device), "threads": threads},
        "seconds": round(time.monotonic() - started, 1),
        "resumed_from": [],
    }


def processor(device: str) -> str:
    """The model name of a device."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
