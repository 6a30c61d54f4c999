"""The command `dxmi`: its arguments, its help, and errors in one line. `commands` does the work."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from typing import NoReturn

from dxmi_ext import __version__, commands
from dxmi_ext.engine.compute import memory
from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import terminal
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.runs.signals import Stopped
from dxmi_ext.engine.settings import expand

_EXTRAS = {
    "train": ("matplotlib", "safetensors", "scipy", "sklearn", "tensorboard", "tqdm", "yaml"),
    "images": ("PIL", "diffusers", "huggingface_hub", "efficientnet_lite_pytorch"),
    "b4": ("timm",),
    "anomalib": ("anomalib", "lightning", "torchvision"),
    "onnx": ("onnx", "onnxscript"),
    "wandb": ("wandb",),
}
"""The modules that each extra of the package installs."""


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
        if isinstance(error, BrokenPipeError):  # for example in `| head`
            return terminal.HUNG_UP
        print(f"dxmi: standard output: {error}", file=sys.stderr)
        return 2


def _run(given: list[str]) -> int:
    options = _read(given)
    memory.keep_freed()
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
        name = (error.name or "dxmi_ext").partition(".")[0]
        if name in ("dxmi_ext", "torch"):
            raise
        extra = next((extra for extra, modules in _EXTRAS.items() if name in modules), None)
        if extra is None:  # a user's own module imports it
            text = f": module {name} is not installed"
        else:
            text = f" requires {name}: pip install 'dxmi_ext[{extra}]'"
        print(f"dxmi {options.command}{text}", file=sys.stderr)
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
    except Stopped as stop:  # the command has said so
        return stop.status
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
    if given[:1] == ["help"]:
        given = [*given[1:], "--help"]
    parser, names = _parser()
    if given and not given[0].startswith("-") and given[0] not in names:
        hint = config.did_you_mean(given[0], names)
        parser.error(f"COMMAND must be one of {', '.join(names)}, got {given[0]!r}{hint}")
    end = given.index("--") if "--" in given else len(given)
    # Flags first: argparse accepts no optional positional arguments after them.
    flags_first = sorted(given[1:end], key=lambda text: not re.match("-.", text))
    options, unknown = parser.parse_known_args([*given[:1], *flags_first, *given[end:]])
    if unknown:
        options.parser.error(_hint(unknown[0], given))
    if options.command != "info" and options.target is None and not options.help:
        options.parser.error(f"{options.target_name} is missing; see dxmi {options.command} --help")
    return options


def _hint(unknown: str, given: list[str]) -> str:
    """The error for an unknown argument, such as ``--seed 3`` or ``--seed=3``, with the right syntax."""
    if not unknown.startswith("-") or given[0] == "info":  # info has no settings
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


def _parser() -> tuple[argparse.ArgumentParser, Collection[str]]:
    """The parser, and the names of the commands."""
    parser = _Parser(
        prog="dxmi",
        description="Train few-step samplers and energies by DxMI.",
        epilog="dxmi COMMAND --help lists the settings of a command, dxmi train RECIPE --help of a recipe.",
    )
    parser.add_argument("--version", action="version", version=f"dxmi_ext {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(
        name: str,
        run: Callable[[argparse.Namespace], None],
        help: str,
        target: str = "",
        rest: str = "key=value",
        about: str = "settings, listed below",
    ) -> argparse.ArgumentParser:
        # argparse's own help lacks the settings.
        sub = subparsers.add_parser(name, help=help, description=help, add_help=False, allow_abbrev=False)
        shown = "show this help and every setting" if target else "show this help"
        sub.add_argument("-h", "--help", action="store_true", help=shown)
        if target:
            sub.add_argument("target", metavar=target.split(":")[0], nargs="?", help=target.split(": ")[1])
            sub.add_argument("settings", nargs="*", metavar=rest, help=about)
        sub.set_defaults(run=run, parser=sub, target_name=target.split(":")[0])
        return sub

    recipe = "RECIPE: name of a recipe, or path of a yaml file"
    for name, help in (
        ("train", "Run a recipe: its pretraining first, then DxMI."),
        ("pretrain", "Run a recipe's pretraining alone."),
    ):
        sub = command(name, commands.train, help, recipe)
        sub.add_argument(
            "--dry-run",
            action="store_true",
            help="build everything, run one iteration of each phase, write nothing",
        )
    sub = command(
        "data",
        commands.data,
        "Show what would be read from a path: splits, classes, masks, sizes, and what is skipped.",
        "PATH: folder or file of images, file of vectors, or, with recipe=8gaussians, file of 2D points",
        rest="recipe=NAME or key=value",
        about="settings, explained below",
    )
    sub.add_argument("--json", action="store_true", help="print JSON")
    run = "RUN: folder of a finished run, or name of one that ships with the package"
    command(
        "sample",
        commands.sample,
        "Draw samples from a run's sampler; with torchrun, on several devices.",
        run,
    )
    command("evaluate", commands.evaluate, "Compute a run's metrics again.", run)
    command(
        "score",
        commands.score,
        "Score images with a run of anomaly detection: a table, heat maps and a page of cards; or a file "
        "of vectors with a run of vectors: a table.",
        run,
        rest="IMAGE, FOLDER, FILE or key=value",
        about="what to score, or settings, listed below",
    )
    command(
        "report", commands.report, "Write metrics, curves and pictures as one page.", "RUN: folder of a run"
    )
    sub = command(
        "reproduce",
        commands.reproduce,
        "Run an experiment, row by row and seed by seed, and write its table.",
        "EXPERIMENT: name of an experiment",
    )
    sub.add_argument("--quick", action="store_true", help="run a tenth of the iterations, in minutes")
    command(
        "export",
        commands.export,
        "Save a run's image sampler as a diffusers pipeline, a detector as .pt2 (torch.export) and ONNX.",
        run,
    )
    command(
        "push",
        commands.push,
        "Export a run and upload it, with its model card, to the Hugging Face Hub.",
        run,
    )
    command(
        "convert",
        commands.convert,
        "Convert a checkpoint of EDM or consistency models to a diffusers folder.",
        "CHECKPOINT: state dict, in safetensors or written by torch.save",
    )
    command("info", commands.info, "Show versions, and which kernels run here.")
    return parser, subparsers.choices


if __name__ == "__main__":
    sys.exit(main())
