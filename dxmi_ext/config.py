"""Settings of a recipe: dataclasses read from yaml and from ``key=value`` on the command line.

A value is text, which the type of its key reads, the same way in both places. Imports the standard library,
``dxmi_ext.errors`` and ``dxmi_ext.files``; PyYAML (extra ``train``) where yaml is read or written.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import os
import re
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar

from dxmi_ext import files
from dxmi_ext.errors import UserError

C = TypeVar("C", bound="Settings")

LARGEST_SEED = 2**63 - 1
"""The noise key and torch's generators hold it, and the number after it."""
LARGEST_RUN = 10**7
"""Iterations of a phase: the four phases of a run together stay below the 10^8 of a checkpoint's name."""
_LARGEST_INT, _LARGEST_FLOAT = 10**9, 1e30  # of settings that declare no maximum; a float32 holds both
_LONGEST_YAML = 2**20  # bytes


class ConfigError(UserError, ValueError):
    """A setting that is unknown, of the wrong type or out of range."""


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[Any] | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    pattern: str | None = None,
    path: bool = False,
) -> Any:
    """Declare one key of a ``Settings``: a bool, a number or text, or None where the type allows it.

    Args:
        default: its value where neither the yaml nor the command line gives one.
        help: its meaning in one line, shown by ``--help``.
        choices: the only values allowed.
        minimum: the smallest value allowed. ``None`` is allowed whatever all of these say.
        maximum: the largest value allowed; None: 10^9 of integers, 10^30 of other numbers.
        below: what the value must stay below.
        pattern: a regular expression that the whole text must match; ``help`` says what that means.
        path: whether the text may be a path, so that a leading ``~`` is a home folder.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "pattern": pattern, "path": path}
    metadata |= {"minimum": minimum, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


def seed_setting(help: str) -> Any:
    """The key ``seed``."""
    return setting(0, help, minimum=0, maximum=LARGEST_SEED)


@dataclasses.dataclass
class Settings:
    """A group of settings, checked when made. A subclass that adds keys names them for ``--help``.

    Raises:
        ConfigError: a value is not among its choices, out of its bounds, not finite or not of its pattern.
    """

    heading = "settings"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            choices, pattern = field.metadata["choices"], field.metadata["pattern"]
            if value is None:
                continue
            if choices is not None and value not in choices:
                raise ConfigError(f"{name}: got {value!r}, wants one of {', '.join(map(str, choices))}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_bounds(name, value, field.metadata)
            if pattern is not None and not re.fullmatch(pattern, value):
                raise ConfigError(f"{name}: got {value!r}, wants {field.metadata['help']}")
            if field.metadata["path"]:
                setattr(self, name, expand(name, value))

    def changed(self, name: str) -> bool:
        """Whether a key has another value than its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


def _check_bounds(name: str, value: float, bounds: typing.Mapping[str, Any]) -> None:
    minimum, maximum, below = (bounds[key] for key in ("minimum", "maximum", "below"))
    if not math.isfinite(value):
        raise ConfigError(f"{name}: got {value!r}, wants a finite number")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name}: got {value!r}, wants {minimum} or more")
    if below is not None and value >= below:
        raise ConfigError(f"{name}: got {value!r}, wants less than {below}")
    largest = _LARGEST_INT if isinstance(value, int) else _LARGEST_FLOAT
    if value > (largest if maximum is None else maximum):
        raise ConfigError(f"{name}: got {value!r}, wants {largest if maximum is None else maximum} or less")
    if minimum is None and value < -largest:
        raise ConfigError(f"{name}: got {value!r}, wants {-largest} or more")


def expand(name: str, path: str) -> str:
    """A path whose leading ``~`` or ``~USER`` is a home folder, as this locale has its bytes: UTF-8, and what
    else a name was given in.

    Args:
        name: what the path is of, for the error.

    Raises:
        ConfigError: that home folder is unknown.
    """
    expanded = os.path.expanduser(os.fsdecode(path.encode(errors="surrogateescape")))
    if expanded.startswith("~"):
        raise ConfigError(f"{name} must not begin with ~ where its home folder is unknown, got {path!r}")
    return expanded


def device_setting() -> Any:
    """The key ``device``, the same for every command."""
    return setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:[0-9]+)?")


@dataclasses.dataclass
class RunConfig(Settings):
    """The keys that every recipe has; a recipe adds its own by inheritance."""

    heading = "the run"
    recipe: str = setting("", "name of the recipe, without a slash", pattern=r"[^/]*")
    task: str = setting("two_d", "what kind of recipe: the module of dxmi_ext.recipes that runs it")
    output: str | None = setting(None, "folder of the run; null: runs/RECIPE-TIME", path=True)
    seed: int = seed_setting("seed of every random choice")
    iterations: int = setting(1000, "iterations of DxMI", minimum=0, maximum=LARGEST_RUN)
    pretrain_iterations: int = setting(1000, "iterations of pretraining", minimum=0, maximum=LARGEST_RUN)
    pretrained: bool = setting(True, "false: skip pretraining and train from scratch")
    batch_size: int = setting(
        256, "global batch size; the number of ranks must divide it", minimum=1, maximum=2**20
    )
    checkpoint_every: int = setting(1000, "iterations between checkpoints", minimum=1)
    keep_checkpoints: int = setting(2, "number of checkpoints kept", minimum=1)
    rollback_after: int = setting(
        50, "steps in a row, not finite, that send the run back to its last checkpoint; 0: never", minimum=0
    )
    rollbacks: int = setting(3, "how often it may go back before it stops", minimum=0)
    rollback_lr: float = setting(0.5, "factor of all learning rates each time", minimum=0)
    log_every: int = setting(50, "iterations between lines of metrics.jsonl", minimum=1)
    device: str = device_setting()
    threads: int = setting(0, "CPU threads of torch; 0: its own choice", minimum=0, maximum=1024)
    shard: bool = setting(
        False, "of many ranks, each holds a part of the weights (FSDP2); false: all of them"
    )
    resume: str = setting("auto", "auto, never or the path of a checkpoint", path=True)
    picture_every: int = setting(1000, "iterations between pictures in pictures/; 0: none", minimum=0)
    tensorboard: bool = setting(True, "also log to tb/ for tensorboard")
    wandb: str | None = setting(None, "also log to this project of Weights & Biases; null: do not")
    dry_run: bool = setting(False, "try one iteration of each phase and write nothing; also --dry-run")


@dataclasses.dataclass
class EvaluateSettings(Settings):
    """Settings of the command ``evaluate``; a task adds its own by inheritance."""

    output: str | None = setting(None, "json file to write the numbers to; null: none", path=True)
    seed: int = seed_setting("seed of samples and data")
    device: str = device_setting()


def load(cls: type[C], yaml_path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read settings: the class's defaults, then the yaml over them, then the overrides in their order, so
    that the last one counts where a key is given twice.

    Numbers are decimal (010 is 10, 1_000 is 1000), and an integer may be written as 1e3.

    Args:
        cls: the recipe's settings.
        yaml_path: a mapping of keys to values, each key once; None: the defaults stand.
        overrides: ``key=value``; nothing, or null, is None.

    Raises:
        ConfigError: names the key, what it got and what it wants (an unknown key: the nearest known one).
    """
    types = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    pairs = _read_yaml(yaml_path) if yaml_path else []
    for key, text in [*pairs, *map(_read_override, overrides)]:
        if key not in types:
            nearest = difflib.get_close_matches(key, types, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(types)}"
            raise ConfigError(f"{key if key.isprintable() else repr(key)}: unknown key; {hint}")
        values[key] = _read_value(key, text, types[key])
    return cls(**values)


def peek(yaml_path: str | Path, key: str, default: Any = None) -> Any:
    """The text of one key of a yaml file, before its class of settings is known."""
    return dict(_read_yaml(yaml_path)).get(key, default)


def to_yaml(cfg: Settings) -> str:
    """The resolved settings, keys in the order of their declaration."""
    text: str = _import_yaml().safe_dump(dataclasses.asdict(cfg), sort_keys=False, allow_unicode=True)
    return text


def save(cfg: Settings, path: str | Path) -> None:
    """Write the resolved settings, complete or not at all."""
    files.write_text(path, to_yaml(cfg))


def describe(cfg: Settings) -> str:
    """List every key with its meaning, the values in ``cfg`` being the defaults; one aligned line a key,
    under the heading of the class that brings it in."""
    classes = [c for c in reversed(type(cfg).__mro__) if issubclass(c, Settings)]
    groups: dict[str, list[tuple[str, str]]] = {}
    for field in dataclasses.fields(cfg):
        value, choices = getattr(cfg, field.name), field.metadata["choices"]
        shown = value if isinstance(value, str) else json.dumps(value)
        allowed = f" ({' | '.join(map(str, choices))})" if choices else ""
        first = next(c for c in classes if field.name in inspect.get_annotations(c))
        rows = groups.setdefault(first.heading, [])
        rows.append((f"{field.name}={shown}", field.metadata["help"] + allowed))
    width = max(len(left) for rows in groups.values() for left, _ in rows)
    return "\n\n".join(
        "\n".join([f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in rows)])
        for heading, rows in groups.items()
    )


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("reading settings needs PyYAML: pip install 'dxmi_ext[train]'") from error
    return yaml


def _read_yaml(path: str | Path) -> list[tuple[str, str | None]]:
    """The keys and texts of a yaml file that holds one mapping of them; a null is None."""
    yaml = _import_yaml()
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_YAML + 1)
        if len(content) > _LONGEST_YAML:
            raise ConfigError(f"{path} must be at most {_LONGEST_YAML} bytes of yaml")
        # Nodes, not values: what a text means is for the key's type to say, not for YAML 1.1.
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as yaml: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as yaml: it is nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        got = {yaml.ScalarNode: "text", yaml.SequenceNode: "a list"}.get(type(root), "an empty file")
        raise ConfigError(f"{path}: got {got}, wants a mapping of keys to values")
    pairs: dict[str, str | None] = {}
    for key, value in root.value:
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            got = "a list" if isinstance(value, yaml.SequenceNode) else "a mapping"
            raise ConfigError(f"{path}: {_shown(key)} must be a single value, got {got}")
        if key.value in pairs:
            raise ConfigError(f"{path}: {key.value} must be given once, got it twice")
        pairs[key.value] = None if value.tag.endswith(":null") else value.value
    return list(pairs.items())


def _shown(key: Any) -> str:
    return key.value if isinstance(key.value, str) else "a key"


def _read_override(override: str) -> tuple[str, str | None]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: wants key=value")
    return key, None if text in ("", "null") else text


def _read_value(key: str, text: str | None, wanted: Any) -> Any:
    """A value of a key's type, which is one of ``_READERS``, or that or None."""
    kind, *others = typing.get_args(wanted) or (wanted,)
    if text is None and NoneType in others:
        return None
    try:
        if text is not None:
            return _READERS[kind](text)
    except ValueError:
        pass
    raise ConfigError(f"{key}: got {text!r}, wants {inspect.formatannotation(wanted)}")


def _read_int(text: str) -> int:
    if not text.isascii():  # python reads the digits of all scripts
        raise ValueError
    try:
        return int(text)
    except ValueError:
        number = float(text)
    if not number.is_integer() or abs(number) > 2**53:
        raise ValueError
    return int(number)


def _read_float(text: str) -> float:
    return float(text if text.isascii() else "")


def _read_bool(text: str) -> bool:
    for value, texts in ((True, ("true", "yes", "on", "1")), (False, ("false", "no", "off", "0"))):
        if text.strip().lower() in texts:
            return value
    raise ValueError


def _read_text(text: str) -> str:
    if "\0" in text:  # which no path may have
        raise ValueError
    text.encode(errors="surrogateescape")  # what is neither a character nor a byte is a ValueError
    return text


_READERS: dict[type, Callable[[str], Any]]
_READERS = {int: _read_int, float: _read_float, bool: _read_bool, str: _read_text}
