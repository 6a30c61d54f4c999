"""The command `dxmi`, with a function for each subcommand.

Imports what a command requires when it runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn, TypeVar

from dxmi_ext.engine import config, terminal
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.settings import ConfigError, Settings, expand, setting
from dxmi_ext.engine.signals import Stopped

S = TypeVar("S", bound=Settings)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status. Errors of the user are one line on stderr."""
    terminal.accept_any_text()
    try:
        try:
            return _run(list(sys.argv[1:] if arguments is None else arguments))
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # so that a failed write is reported
    except OSError as error:
        terminal.discard_rest()
        if isinstance(error, BrokenPipeError):  # such as by `| head`
            return terminal.HUNG_UP
        print(f"dxmi: standard output: {error}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    options = _read(given)
    try:
        if getattr(options, "target", None) is not None:
            options.target = expand(options.target_name, options.target)
            options.settings = [_expanded(text) for text in options.settings]
        options.run(options)
    except BrokenPipeError:
        raise
    except (UserError, OSError) as error:
        print(f"dxmi {options.command}: {error}", file=sys.stderr)
        return 2
    except UnicodeEncodeError as error:
        print(
            f"dxmi {options.command}: {error.object!r} cannot be written in this locale's {error.encoding}; "
            "PYTHONUTF8=1 sets another",
            file=sys.stderr,
        )
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("dxmi_ext", "torch")):
            raise
        ours = error.name not in ("diffusers", "huggingface_hub")
        what = "'dxmi_ext[train]'" if ours else error.name
        print(f"dxmi {options.command} requires {error.name}: pip install {what}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not _is_lack_of_memory(error):
            raise
        print(
            f"dxmi {options.command}: out of memory; reduce batches, networks or numbers of samples: "
            f"{' '.join(str(error).split())}",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print(f"dxmi {options.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _is_lack_of_memory(error: Exception) -> bool:
    """Whether Python, numpy, a GPU or a CPU is out of memory; for the last, torch has no error type."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _read(given: list[str]) -> argparse.Namespace:
    """The command's options; invalid ones end the process."""
    end = given.index("--") if "--" in given else len(given)
    # Flags first: argparse accepts no optional positional arguments after them.
    flags_first = sorted(given[1:end], key=lambda text: not re.match("-.", text))
    options, unknown = _parser().parse_known_args([*given[:1], *flags_first, *given[end:]])
    if unknown:
        options.parser.error(_hint(unknown[0], given))
    if options.command != "info" and options.target is None and not options.help:
        options.parser.error(f"what to {options.command} is missing; see dxmi {options.command} --help")
    return options


def _hint(unknown: str, given: list[str]) -> str:
    """The error for an unknown argument, such as ``--seed 3`` or ``--seed=3``, with the right syntax."""
    if not unknown.startswith("-"):
        return f"unexpected argument {unknown!r}"
    name, equals, value = unknown.partition("=")
    example = "seed=3"
    if re.match("--[A-Za-z]", name):
        after = [] if equals else given[given.index(unknown) + 1 :]
        value = after[0] if after and not re.search("^-|=", after[0]) else value or "VALUE"
        example = shlex.quote(f"{name[2:].replace('-', '_')}={value}")
    return f"{name} is not an option; write a setting as {example}"


def _expanded(text: str) -> str:
    """Expands ~ in a path; key=value is left to the key."""
    return expand("path", text) if text.startswith("~") else text


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="dxmi", description="Train few-step samplers and energies by DxMI.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], None],
        help: str,
        target: str = "",
        rest: str = "key=value",
    ) -> argparse.ArgumentParser:
        # argparse's own help lacks the settings.
        sub = commands.add_parser(name, help=help, description=help, add_help=False, allow_abbrev=False)
        sub.add_argument("-h", "--help", action="store_true", help="show this help and every setting")
        if target:
            sub.add_argument("target", metavar=target.split(":")[0], nargs="?", help=target.split(": ")[1])
            sub.add_argument("settings", nargs="*", metavar=rest)
        sub.set_defaults(run=run, parser=sub, target_name=target.split(":")[0])
        return sub

    recipe = "RECIPE: name of a recipe, or path of a yaml file"
    for name, help in (
        ("train", "Run a recipe: its pretraining first, then DxMI."),
        ("pretrain", "Run a recipe's pretraining alone."),
    ):
        sub = command(name, _train, help, recipe)
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="build everything, run one iteration of each phase, write nothing",
        )
    sub = command(
        "data",
        _data,
        "Show what would be read from a path: splits, classes, masks, sizes, and what is skipped.",
        "PATH: folder or file of images, or file of vectors",
        rest="recipe=NAME or key=value",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    run = "RUN: folder of a finished run, or name of one that ships with the package"
    command("sample", _sample, "Draw samples from a run's sampler; with torchrun, on several devices.", run)
    command("evaluate", _evaluate, "Compute a run's metrics again.", run)
    command(
        "score",
        _score,
        "Score images with a run of anomaly detection: a table, heat maps and a page of cards; or a file "
        "of vectors with a run of vectors: a table.",
        run,
        rest="IMAGE, FOLDER, FILE or key=value",
    )
    command("report", _report, "Write metrics, curves and pictures as one page.", "RUN: folder of a run")
    sub = command(
        "reproduce",
        _reproduce,
        "Run an experiment, row by row and seed by seed, and write its table.",
        "EXPERIMENT: name of an experiment",
    )
    sub.add_argument("--quick", action="store_true", help="run a tenth of the iterations, in minutes")
    command(
        "export",
        _export,
        "Save a run's image sampler as a diffusers pipeline, a detector as .pt2 (torch.export) and ONNX.",
        run,
    )
    command("push", _push, "Export a run and upload it, with its model card, to the Hugging Face Hub.", run)
    command(
        "convert",
        _convert,
        "Convert a checkpoint of EDM or consistency models to a diffusers folder.",
        "CHECKPOINT: state dict, in safetensors or written by torch.save",
    )
    command("info", _info, "Show versions, and which kernels run here.")
    return parser


def _train(options: argparse.Namespace) -> None:
    from dxmi_ext import tasks
    from dxmi_ext.engine.run_settings import RunSettings

    if options.target is None:
        common = config.describe(RunSettings(recipe="RECIPE"))
        _show_help(
            options,
            f"recipes: {', '.join(tasks.recipes())}; for the settings of one: dxmi train RECIPE --help"
            f"\n\n{common}",
        )
        return
    from dxmi_ext.engine.device import choose as choose_device
    from dxmi_ext.engine.ranks import Ranks

    path = tasks.find(options.target)
    task = tasks.task_of(path)
    if options.help:
        _show_help(options, config.describe(config.load(task.Config, path)))
        return
    cfg = config.load(task.Config, path, [*options.settings, *["dry_run=true"] * options.dry_run])
    ranks = Ranks.from_environment()
    try:
        with ranks.joined(choose_device(cfg.run.device, ranks.local_rank)):
            (task.train if options.command == "train" else task.pretrain)(cfg, ranks)
    except Stopped:
        if not ranks.first:
            return
        settings = [s for s in options.settings if s.partition("=")[0] not in ("output", "resume")]
        _tell_how_to_go_on(options, f"output={cfg.run.output}", *settings)


def _data(options: argparse.Namespace) -> None:
    import json

    from dxmi_ext import tasks
    from dxmi_ext.anomaly import layouts as anomaly_sources
    from dxmi_ext.anomaly import vectors
    from dxmi_ext.anomaly.overview import recipe_for
    from dxmi_ext.images import layouts as image_sources
    from dxmi_ext.images import overview
    from dxmi_ext.images import recipe as images

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
        raise ConfigError(f"recipe must be one that reads data from a path, got {name!r}")
    read = task.read(config.load(task.Config, yaml, [*settings, f"data={options.target}"]))
    about = {"recipe": name, **read.details()}
    print(json.dumps(about, indent=2) if options.json else overview.text_of(about))


def _sample(options: argparse.Namespace) -> None:
    from dxmi_ext.engine import samples
    from dxmi_ext.engine.device import choose as choose_device
    from dxmi_ext.engine.ranks import Ranks
    from dxmi_ext.method import generate

    if (cfg := _settings(options, generate.SampleSettings)) is None:
        return
    folder, task = _run_of(options)
    output = cfg.output or str(_beside(options, folder, "samples.npz"))
    samples.check_output(output)
    n = cfg.n or (64 if output.endswith(".png") else 10_000)
    ranks = Ranks.from_environment()
    device = choose_device(cfg.device, ranks.local_rank)
    rows = samples.rows_of(n, ranks)
    with ranks.joined(device):
        drawn = task.sample(
            *(folder, rows, cfg.seed, cfg.batch_size, device),
            **{"guidance": cfg.guidance, "labels": cfg.labels, "steps": cfg.steps},
        )
        written = samples.write(output, n, drawn, ranks)
    if ranks.first:
        print(f"{output}: {written}")


def _evaluate(options: argparse.Namespace) -> None:
    from dxmi_ext import tasks
    from dxmi_ext.engine import folders
    from dxmi_ext.engine.device import choose as choose_device
    from dxmi_ext.engine.runlog import write_json

    if options.target is None:
        shown = (
            f"{name} runs:\n{config.describe(tasks.load(name).EvaluateSettings())}" for name in tasks.tasks()
        )
        _show_help(options, "\n\n".join(shown))
        return
    folder, task = _run_of(options)
    if (cfg := _settings(options, task.EvaluateSettings)) is None:
        return
    if cfg.output:
        folders.check_file(Path(cfg.output), folders.is_numbers, "one of a run's numbers")
    if picture := getattr(cfg, "picture", None):
        folders.check_file(Path(picture), folders.is_picture, "a grid of samples", key="picture")
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
    numbers, table = task.evaluate(folder, cfg, choose_device(cfg.device))
    print(table)
    if cfg.output:
        Path(cfg.output).parent.mkdir(parents=True, exist_ok=True)
        write_json(cfg.output, numbers)


def _score(options: argparse.Namespace) -> None:
    from dxmi_ext.anomaly import inspection
    from dxmi_ext.anomaly.scoring import VectorScorer
    from dxmi_ext.engine.device import choose as choose_device

    given, options.settings = inspection.split_arguments(options.settings)
    if (cfg := _settings(options, inspection.ScoreSettings)) is None:
        return
    folder, task = _run_of(options)
    if not hasattr(task, "load_scorer"):
        raise ConfigError(f"RUN must be a run of anomaly detection, got {options.target!r}")
    output = Path(cfg.output or _beside(options, folder, "scores"))
    inspection.check_output(output)
    scorer = task.load_scorer(folder, choose_device(cfg.device))
    if isinstance(scorer, VectorScorer):
        print(f"{output}: {inspection.score_vectors(scorer, given, output, cfg)}")
        return
    pictures = inspection.find_pictures(given, output)
    found, missing = inspection.score(scorer, pictures, output, cfg)
    print(f"{output}: {found}")
    if missing:
        raise UserError(f"{missing} of {len(pictures)} images have no score; scores.csv has the reasons")


def _report(options: argparse.Namespace) -> None:
    @dataclasses.dataclass
    class ReportSettings(Settings):
        output: str | None = setting(None, "file to write; null: RUN/report.html", path=True)

    if (cfg := _settings(options, ReportSettings)) is None:
        return
    from dxmi_ext.engine import files, folders, report

    folder = _folder_of(options)
    output = Path(cfg.output or _beside(options, folder, "report.html"))
    folders.check_file(output, folders.is_page, "the page of a run")
    output.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(output, report.html_of(folder))
    print(output)


def _reproduce(options: argparse.Namespace) -> None:
    from dxmi_ext.reproduce import command as reproduce

    if options.help or options.target is None:
        _show_help(options, reproduce.describe(options.target))
        return
    experiment = reproduce.find(options.target)
    given = [*options.settings, *["quick=true"] * options.quick]
    try:
        reproduce.run(experiment, config.load(reproduce.ReproduceSettings, None, given))
    except Stopped:
        _tell_how_to_go_on(options, *given)


def _export(options: argparse.Namespace) -> None:
    from dxmi_ext import hub

    if (cfg := _settings(options, hub.ExportSettings)) is None:
        return
    folder, task = _run_of(options)
    kind = hub.kind_of(task)
    output = Path(cfg.output or _beside(options, folder, kind))
    usage = hub.export(folder, task, output, onnx=cfg.onnx, license=cfg.license)
    print(f"{output}: a {kind if kind == 'detector' else 'diffusers pipeline'}; usage:\n{usage}")


def _push(options: argparse.Namespace) -> None:
    from dxmi_ext import hub

    if (cfg := _settings(options, hub.PushSettings)) is not None:
        print(hub.push(*_run_of(options), cfg))


def _convert(options: argparse.Namespace) -> None:
    from dxmi_ext.images import exchange

    if (cfg := _settings(options, exchange.ConvertSettings)) is not None:
        output = exchange.convert_checkpoint(Path(options.target), cfg)
        print(f"{output}: a UNet2DModel of diffusers (unet/) and its diffusion (scheduler/)")


def _info(options: argparse.Namespace) -> None:
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


def _tell_how_to_go_on(options: argparse.Namespace, *settings: str) -> None:
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
    from dxmi_ext.engine import folders

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


if __name__ == "__main__":
    sys.exit(main())
