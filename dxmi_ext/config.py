"""Settings of a recipe: dataclasses read from yaml and from ``key=value`` on the command line.

Imports the standard library, ``dxmi_ext.errors`` and ``dxmi_ext.files``; OmegaConf (extra ``train``)
where yaml is read or written.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import json
import math
import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from dxmi_ext import files
from dxmi_ext.errors import UserError

C = TypeVar("C", bound="Settings")


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
) -> Any:
    """Declare one key of a ``Settings``.

    Args:
        default: its value where neither the yaml nor the command line gives one.
        help: its meaning in one line, shown by ``--help``.
        choices: the only values allowed.
        minimum: the smallest value allowed. ``None`` is allowed whatever all of these say.
        maximum: the largest value allowed.
        below: what the value must stay below.
        pattern: a regular expression that the whole text must match; ``help`` says what that means.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "pattern": pattern}
    metadata |= {"minimum": minimum, "maximum": maximum, "below": below}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass
class Settings:
    """A group of settings, checked when made. A subclass that adds keys names them for ``--help``.

    Raises:
        ConfigError: a value is not among its choices, out of its bounds, not finite or not of its pattern.
    """

    heading = "settings"

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            choices, pattern, minimum, maximum, below = (
                field.metadata[k] for k in ("choices", "pattern", "minimum", "maximum", "below")
            )
            if value is None:
                continue
            if choices is not None and value not in choices:
                raise ConfigError(f"{field.name}: got {value!r}, wants one of {', '.join(map(str, choices))}")
            if minimum is not None and not value >= minimum:  # ``not >=`` also refuses nan
                raise ConfigError(f"{field.name}: got {value!r}, wants {minimum} or more")
            if maximum is not None and not value <= maximum:
                raise ConfigError(f"{field.name}: got {value!r}, wants {maximum} or less")
            if below is not None and not value < below:
                raise ConfigError(f"{field.name}: got {value!r}, wants less than {below}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{field.name}: got {value!r}, wants a finite number")
            if pattern is not None and not re.fullmatch(pattern, value):
                raise ConfigError(f"{field.name}: got {value!r}, wants {field.metadata['help']}")

    def changed(self, name: str) -> bool:
        """Whether a key has another value than its default."""
        return bool(getattr(self, name) != type(self).__dataclass_fields__[name].default)


def device_setting() -> Any:
    """The key ``device``, the same for every command."""
    return setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:\d+)?")


@dataclasses.dataclass
class RunConfig(Settings):
    """The keys that every recipe has; a recipe adds its own by inheritance."""

    heading = "the run"
    recipe: str = setting("", "name of the recipe")
    task: str = setting("two_d", "what kind of recipe: the module of dxmi_ext.recipes that runs it")
    output: str | None = setting(None, "folder of the run; null: runs/RECIPE-TIME")
    seed: int = setting(0, "seed of every random choice", minimum=0)
    iterations: int = setting(1000, "iterations of DxMI", minimum=0)
    pretrain_iterations: int = setting(1000, "iterations of pretraining", minimum=0)
    pretrained: bool = setting(True, "false: skip pretraining and train from scratch")
    batch_size: int = setting(256, "global batch size; the number of ranks must divide it", minimum=1)
    checkpoint_every: int = setting(1000, "iterations between checkpoints", minimum=1)
    keep_checkpoints: int = setting(2, "number of checkpoints kept", minimum=1)
    rollback_after: int = setting(
        50, "steps in a row, not finite, that send the run back to its last checkpoint; 0: never", minimum=0
    )
    rollbacks: int = setting(3, "how often it may go back before it stops", minimum=0)
    rollback_lr: float = setting(0.5, "factor of all learning rates each time", minimum=0)
    log_every: int = setting(50, "iterations between lines of metrics.jsonl", minimum=1)
    device: str = device_setting()
    threads: int = setting(0, "CPU threads of torch; 0: its own choice", minimum=0)
    shard: bool = setting(
        False, "of many ranks, each holds a part of the weights (FSDP2); false: all of them"
    )
    resume: str = setting("auto", "auto, never or the path of a checkpoint")
    picture_every: int = setting(1000, "iterations between pictures in pictures/; 0: none", minimum=0)
    tensorboard: bool = setting(True, "also log to tb/ for tensorboard")
    wandb: str | None = setting(None, "also log to this project of Weights & Biases; null: do not")
    dry_run: bool = setting(False, "try one iteration of each phase and write nothing; also --dry-run")


@dataclasses.dataclass
class EvaluateSettings(Settings):
    """Settings of the command ``evaluate``; a task adds its own by inheritance."""

    output: str | None = setting(None, "json file to write the numbers to; null: none")
    seed: int = setting(0, "seed of samples and data", minimum=0)
    device: str = device_setting()


def load(cls: type[C], yaml_path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read settings: the class's defaults, then the yaml over them, then the overrides in their order.

    Args:
        cls: the recipe's settings.
        yaml_path: a mapping of keys to values; None: the defaults stand.
        overrides: ``key=value``, the value in yaml's notation; for a key that holds text, as it stands.

    Raises:
        ConfigError: names the key, what it got and what it wants (an unknown key: the nearest known one).
    """
    omegaconf = _import_omegaconf()
    types = typing.get_type_hints(cls)
    settings = omegaconf.OmegaConf.structured(cls)
    pairs = _read_yaml(yaml_path) if yaml_path else []
    for key, value in [*pairs, *(_read_override(text, types) for text in overrides)]:
        if key not in types:
            nearest = difflib.get_close_matches(str(key), types, n=1, cutoff=0.4)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the keys are {', '.join(types)}"
            raise ConfigError(f"{key}: unknown key; {hint}")
        try:
            omegaconf.OmegaConf.update(settings, key, value)
            _ = settings[key]  # reading resolves a ${reference}
        except omegaconf.errors.OmegaConfBaseException as error:
            wanted = inspect.formatannotation(types[key])
            raise ConfigError(f"{key}: got {value!r}, wants {wanted}") from error
    return cls(**omegaconf.OmegaConf.to_container(settings, resolve=True))


def peek(yaml_path: str | Path, key: str, default: Any = None) -> Any:
    """One key of a yaml file, before its class of settings is known."""
    return dict(_read_yaml(yaml_path)).get(key, default)


def to_yaml(cfg: Settings) -> str:
    """The resolved settings, keys in the order of their declaration."""
    conf = _import_omegaconf().OmegaConf
    text: str = conf.to_yaml(conf.structured(cfg))
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


def _import_omegaconf() -> Any:
    try:
        import omegaconf
    except ImportError as error:
        raise ConfigError("reading settings needs OmegaConf: pip install 'dxmi_ext[train]'") from error
    return omegaconf


def _read_yaml(path: str | Path) -> list[tuple[Any, Any]]:
    """The (key, value) pairs of a yaml file that holds one mapping."""
    from yaml import YAMLError

    conf = _import_omegaconf().OmegaConf
    try:
        content = conf.to_container(conf.load(path))
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as yaml: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: got a {type(content).__name__}, wants a mapping of keys to values")
    return list(content.items())


def _read_override(override: str, types: dict[str, Any]) -> tuple[str, Any]:
    """Split ``key=value``; text stays as typed (007 is no number there), the rest is yaml."""
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override}: wants key=value")
    wanted = types.get(key)
    if str in (wanted, *typing.get_args(wanted)) and text not in ("", "null"):
        return key, text
    try:
        return key, yaml.safe_load(text)
    except yaml.YAMLError:
        return key, text  # the type check will say what is wanted
