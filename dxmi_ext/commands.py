"""What each subcommand of `dxmi` does, given its options.

Imports what a command requires when it runs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.runs.signals import Stopped
from dxmi_ext.engine.settings import ConfigError, Settings

S = TypeVar("S", bound=Settings)
_TASKS = {"two_d": "2D densities", "anomaly": "anomaly detection", "energies": "given energies"}


def train(options: argparse.Namespace) -> None:
    from dxmi_ext import tasks
    from dxmi_ext.engine.run_settings import RunSettings

    if options.target is None:
        _, _, common = config.describe(RunSettings(recipe="RECIPE", task="TASK")).partition("\n")
        _show_help(
            options,
            f"recipes: {', '.join(tasks.recipes())}; for the settings of one: "
            f"dxmi {options.command} RECIPE --help\n\n"
            f"settings of every recipe, which may have other defaults:\n{common}",
        )
        return
    from dxmi_ext.engine.compute.device import choose as choose_device
    from dxmi_ext.engine.compute.ranks import Ranks
    from dxmi_ext.engine.output.runlog import note

    path = tasks.find(options.target)
    task = tasks.task_of(path)
    if options.help:
        _show_help(options, config.describe(tasks.settings_of(task, path)))
        return
    if not hasattr(task, options.command):
        raise ConfigError(f"RECIPE must be one with a pretraining, got {options.target!r}; use dxmi train")
    given = [*options.settings, "dry_run=true"] if options.dry_run else options.settings
    cfg = tasks.settings_of(task, path, given)
    ranks = Ranks.from_environment()
    typed = [text.partition("=")[0] for text in options.settings]
    if ranks.first and (idle := cfg.without_effect(typed)):
        note(f"note: {'; '.join(idle)}")
    try:
        with ranks.joined(choose_device(cfg.run.device, ranks)):
            getattr(task, options.command)(cfg, ranks)
    except Stopped:
        if ranks.first:
            settings = [s for s in options.settings if s.partition("=")[0] not in ("output", "resume")]
            _tell_how_to_resume(options, f"output={cfg.run.output}", *settings)
        raise


def data(options: argparse.Namespace) -> None:
    import json

    from dxmi_ext import tasks
    from dxmi_ext.anomaly.data import layouts as anomaly_sources
    from dxmi_ext.anomaly.data import vectors
    from dxmi_ext.anomaly.data.overview import recipe_for
    from dxmi_ext.images import recipe as images
    from dxmi_ext.images.data import layouts as image_sources
    from dxmi_ext.images.data import overview

    if options.help or options.target is None:
        layouts = (
            f"{title}:\n{module.LAYOUTS}"
            for title, module in (("images", image_sources), ("anomaly", anomaly_sources))
        )
        keys = (
            "recipe=NAME  recipe that reads PATH, or images; by default anomaly or anomaly-vectors "
            "if PATH\n             has one of their layouts, else images\n"
            "key=value    setting of that recipe, such as classes= or train_share="
        )
        _show_help(options, "\n\n".join([keys, *layouts, f"anomaly-vectors, an npz:\n{vectors.LAYOUTS}"]))
        return
    chosen = [text for text in options.settings if text.startswith("recipe=")]
    settings = [text for text in options.settings if text not in chosen]
    name = chosen[-1].partition("=")[2] if chosen else recipe_for(Path(options.target))
    yaml = None if name == "images" else tasks.find(name)
    task = images if yaml is None else tasks.task_of(yaml)
    if not hasattr(task, "read"):
        raise ConfigError(f"recipe must be one of 2D points, images or anomaly detection, got {name!r}")
    read = task.read(config.load(task.Config, yaml, [*settings, f"data={options.target}"]))
    about = {"recipe": name, **read.details()}
    print(json.dumps(about, indent=2) if options.json else overview.text_of(about))


def sample(options: argparse.Namespace) -> None:
    from dxmi_ext.engine.compute.device import choose as choose_device
    from dxmi_ext.engine.compute.ranks import Ranks
    from dxmi_ext.engine.output import samples
    from dxmi_ext.method import generate

    if (cfg := _settings(options, generate.SampleSettings)) is None:
        return
    folder, task = _run_of(options)
    output = cfg.output or str(_beside(options, folder, "samples.npz"))
    samples.check_output(output, getattr(task, "SAMPLES", "images"))
    n = cfg.n or (64 if output.endswith(".png") else 10_000)
    ranks = Ranks.from_environment()
    device = choose_device(cfg.device, ranks)
    rows = samples.rows_of(n, ranks)
    with ranks.joined(device):
        drawn = task.sample(
            folder,
            rows,
            cfg.seed,
            cfg.batch_size,
            device,
            guidance=cfg.guidance,
            labels=cfg.labels,
            steps=cfg.steps,
        )
        written = samples.write(output, n, drawn, ranks)
    if ranks.first:
        print(f"{output}: {written}")


def evaluate(options: argparse.Namespace) -> None:
    from dxmi_ext import tasks
    from dxmi_ext.engine.compute.device import choose as choose_device
    from dxmi_ext.engine.output.runlog import write_json
    from dxmi_ext.engine.storage import folders

    if options.target is None:
        shown = (
            f"runs of {_TASKS.get(name, name)}:\n{config.describe(tasks.load(name).EvaluateSettings())}"
            for name in tasks.tasks()
        )
        _show_help(options, "\n\n".join(shown))
        return
    folder, task = _run_of(options)
    if (cfg := _settings(options, task.EvaluateSettings)) is None:
        return
    kinds = {"output": (folders.is_numbers, "one of a run's numbers")}
    kinds |= dict.fromkeys(("picture", "neighbors"), (folders.is_picture, "a grid of samples"))
    outputs = {key: Path(path) for key in kinds if (path := getattr(cfg, key, None))}
    for key, path in outputs.items():
        folders.check_file(path, *kinds[key], key=key)
    if len({path.resolve() for path in outputs.values()}) < len(outputs):
        got = ", ".join(repr(str(path)) for path in outputs.values())
        raise ConfigError(f"{' and '.join(outputs)} must be different files, got {got}")
    for path in outputs.values():
        path.parent.mkdir(parents=True, exist_ok=True)
    numbers, table = task.evaluate(folder, cfg, choose_device(cfg.device))
    print(table)
    if cfg.output:
        write_json(cfg.output, folders.NUMBERS_ENTRY | numbers)


def score(options: argparse.Namespace) -> None:
    from dxmi_ext.anomaly.scores import inspection, score_files
    from dxmi_ext.anomaly.scores.scoring import VectorScorer
    from dxmi_ext.engine.compute.device import choose as choose_device

    given, options.settings = inspection.split_arguments(options.settings)
    if (cfg := _settings(options, inspection.ScoreSettings)) is None:
        return
    folder, task = _run_of(options)
    if not hasattr(task, "load_scorer"):
        raise ConfigError(f"RUN must be a run of anomaly detection, got {options.target!r}")
    output = Path(cfg.output or _beside(options, folder, "scores"))
    score_files.check_output(output)
    scorer = task.load_scorer(folder, choose_device(cfg.device))
    if isinstance(scorer, VectorScorer):
        print(f"{output}: {inspection.score_vectors(scorer, given, output, cfg)}")
        return
    pictures = inspection.find_pictures(given, output)
    found, missing = inspection.score(scorer, pictures, output, cfg)
    print(f"{output}: {found}")
    if missing:
        raise UserError(f"{missing} of {len(pictures)} images have no score; scores.csv has the reasons")


def report(options: argparse.Namespace) -> None:
    from dxmi_ext.engine.runs import report
    from dxmi_ext.engine.storage import files, folders

    if (cfg := _settings(options, report.ReportSettings)) is None:
        return
    folder = _folder_of(options)
    output = Path(cfg.output or _beside(options, folder, "report.html"))
    folders.check_file(output, folders.is_page, "the page of a run")
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, report.html_of(folder))
    print(output)


def reproduce(options: argparse.Namespace) -> None:
    from dxmi_ext.reproduce import command as reproduce

    if options.help or options.target is None:
        _show_help(options, reproduce.describe(options.target))
        return
    experiment = reproduce.find(options.target)
    given = [*options.settings, "quick=true"] if options.quick else options.settings
    try:
        reproduce.run(experiment, config.load(reproduce.ReproduceSettings, None, given))
    except Stopped:
        _tell_how_to_resume(options, *given)
        raise


def export(options: argparse.Namespace) -> None:
    from dxmi_ext import hub

    if (cfg := _settings(options, hub.ExportSettings)) is None:
        return
    folder, task = _run_of(options)
    kind = hub.kind_of(task)
    output = Path(cfg.output or _beside(options, folder, kind))
    usage = hub.export(folder, task, output, onnx=cfg.onnx, license=cfg.license)
    print(f"{output}: a {kind if kind == 'detector' else 'diffusers pipeline'}; usage:\n{usage}")


def push(options: argparse.Namespace) -> None:
    from dxmi_ext import hub

    if (cfg := _settings(options, hub.PushSettings)) is not None:
        print(hub.push(*_run_of(options), cfg))


def convert(options: argparse.Namespace) -> None:
    from dxmi_ext.images.networks import exchange

    if (cfg := _settings(options, exchange.ConvertSettings)) is not None:
        output = exchange.convert_checkpoint(Path(options.target), cfg)
        print(f"{output}: a UNet2DModel of diffusers (unet/) and its diffusion (scheduler/)")


def info(options: argparse.Namespace) -> None:
    if options.help:
        _show_help(options)
        return
    import platform

    import torch

    from dxmi_ext import __version__, _native

    facts = {
        "dxmi_ext": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_native.build_info(),
        "CUDA devices": ", ".join(
            torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())
        ) or "none",
        "threads": str(torch.get_num_threads()),
    }  # fmt: skip
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


def _tell_how_to_resume(options: argparse.Namespace, *settings: str) -> None:
    again = shlex.join(["dxmi", options.command, options.target, *settings])
    print(f"stopped; to resume: {again}", file=sys.stderr)


def _settings(options: argparse.Namespace, cls: type[S]) -> S | None:
    """The settings of a command, or None after showing their help."""
    if options.help or options.target is None:
        _show_help(options, config.describe(cls()))
        return None
    return config.load(cls, None, options.settings)


def _run_of(options: argparse.Namespace) -> tuple[Path, ModuleType]:
    """The folder of a finished run, and its task."""
    from dxmi_ext import tasks

    folder = _folder_of(options)
    if not (folder / "model").is_dir():
        raise ConfigError(f"RUN must be a finished run, got {options.target!r}, which has no model/")
    return folder, tasks.task_of(folder / "config.yaml")


def _folder_of(options: argparse.Namespace) -> Path:
    """The folder of a run, finished or not, of any task or of `dxmi_ext.fit`."""
    from dxmi_ext import tasks
    from dxmi_ext.engine.storage import folders

    folder = Path(options.target)
    if not folder.is_dir():
        folder = tasks.shipped().get(options.target, folder)
    if not (folders.is_run(folder) and (folder / "config.yaml").is_file()):
        also = f", or one of {', '.join(tasks.shipped())}" if tasks.shipped() else ""
        raise ConfigError(f"RUN must be the folder of a run, with config.yaml{also}, got {options.target!r}")
    return folder


def _beside(options: argparse.Namespace, folder: Path, name: str) -> Path:
    """Default path of an output: in the run's folder, or in the current one for a run that ships."""
    return folder / name if Path(options.target).is_dir() else Path(f"{folder.name}-{name}")


def _show_help(options: argparse.Namespace, more: str = "") -> None:
    print(options.parser.format_help() + (f"\n{more}" if more else ""))
