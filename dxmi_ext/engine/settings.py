"""Settings as dataclasses: single values, groups of them that stand beside what they set, and all of a task.

A group is a `Settings`, a task's settings are a `Config` of groups. Keys are flat: they are the names of the
fields, whatever the group, and no two groups of a task share one. Imports ``engine.errors``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

from dxmi_ext.engine.errors import UserError

S = TypeVar("S", bound="Settings")
C = TypeVar("C", bound="Config")

LARGEST_SEED = 2**63 - 1
"""The noise key and torch's generators hold it, and the number after it."""
_LARGEST_INT, _LARGEST_FLOAT = 10**9, 1e30  # of settings that declare no maximum; a float32 holds both


class ConfigError(UserError, ValueError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""


# --- single settings ---------------------------------------------------------------------------------


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


def device_setting() -> Any:
    """The key ``device``, the same for every command."""
    return setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:[0-9]+)?")


class Key(NamedTuple):
    """A setting of a `Settings` or `Config`."""

    group: str | None
    """The field of a `Config` that holds it; None: of a `Settings`."""
    heading: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]


# --- groups ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """A group of settings, each checked when it is made.

    Attributes:
        heading: of the group, for ``--help``.
        removed: keys of earlier versions, each with what takes its place; see `config.load`.
        given: the keys that a user gave, even where the value is the default; of settings made in Python,
            those that differ from it.

    Raises:
        ConfigError: a value is not among its choices, out of its bounds, not finite or not of its pattern.
    """

    heading: ClassVar[str] = "settings"
    removed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        fields = dataclasses.fields(self)
        self.given = frozenset(f.name for f in fields if getattr(self, f.name) != f.default)
        for field in fields:
            name, value = field.name, getattr(self, field.name)
            choices, pattern = field.metadata["choices"], field.metadata["pattern"]
            if value is None:
                continue
            if choices is not None and value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                _check_bounds(name, value, field.metadata)
            if pattern is not None and not re.fullmatch(pattern, value):
                raise ConfigError(f"{name} must be {field.metadata['help']}, got {value!r}")
            if field.metadata["path"]:
                setattr(self, name, expand(name, value))

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Its settings, in the order of their declaration."""
        types = typing.get_type_hints(cls)
        return {
            f.name: Key(None, cls.heading, types[f.name], f.default, f.metadata)
            for f in dataclasses.fields(cls)
        }

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any], given: Collection[str]) -> S:
        """Made of values, of which a user gave some."""
        made = cls(**values)
        made.given = frozenset(given)
        return made

    def flat(self) -> dict[str, Any]:
        """The values of all keys."""
        return dataclasses.asdict(self)


# --- all settings of a task --------------------------------------------------------------------------


class Rule(NamedTuple):
    """What settings must fulfil together."""

    message: str
    """The error, in which {key} stands for the value of a key."""
    holds: Callable[[View], bool]


def only_with(condition: str, applies: Callable[[View], bool], *keys: str) -> list[Rule]:
    """Rules that each of these keys is given only where it has an effect.

    Args:
        condition: what it needs, as text.
    """

    def rule(key: str) -> Rule:
        return Rule(
            f"{key} needs {condition}, got {key}={{{key}}}", lambda s: key not in s.given or applies(s)
        )

    return [rule(key) for key in keys]


class View:
    """The settings of several groups by their flat keys."""

    def __init__(self, groups: Iterable[Settings]) -> None:
        self._groups = tuple(groups)
        self.given = frozenset[str]().union(*(group.given for group in self._groups))

    def __getattr__(self, key: str) -> Any:
        for group in self._groups:
            if hasattr(group, key):
                return getattr(group, key)
        raise AttributeError(key)


def check(rules: Iterable[Rule], *groups: Settings) -> None:
    """Refuses settings that are at odds.

    Raises:
        ConfigError: the message of the first rule that they break.
    """
    view = View(groups)
    for message, holds in rules:
        if not holds(view):
            keys = {key: _shown(value) for group in groups for key, value in group.flat().items()}
            raise ConfigError(message.format_map(keys))


def group(kind: type[Settings], **defaults: Any) -> Any:
    """Declare a group of a ``Config``; its class's defaults, or others."""

    def make() -> Settings:
        return kind.of(defaults, ())

    return dataclasses.field(default_factory=make, metadata={"kind": kind, "defaults": defaults})


@dataclasses.dataclass
class Config:
    """All settings of a task, by groups. A subclass declares groups by `group`, and its rules.

    Attributes:
        rules: between settings; checked when settings are made by `of` or `replace`.
        removed: keys of earlier versions, each with what takes its place; see `config.load`.

    Raises:
        ConfigError: as of `Settings`, or a rule is broken.
    """

    rules: ClassVar[Sequence[Rule]] = ()
    removed: ClassVar[Mapping[str, str]] = {}

    @property
    def given(self) -> frozenset[str]:
        """The keys that a user gave, even where the value is the default."""
        return View(self.groups()).given

    def groups(self) -> Iterator[Settings]:
        return (getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """Its settings, in the order of their declaration."""
        found: dict[str, Key] = {}
        for field in dataclasses.fields(cls):
            kind, defaults = field.metadata["kind"], field.metadata["defaults"]
            for name, key in kind.keys().items():
                assert name not in found, f"{name} is a key of two groups"
                found[name] = key._replace(group=field.name, default=defaults.get(name, key.default))
        return found

    @classmethod
    def of(cls: type[C], values: Mapping[str, Any] | None = None, given: Collection[str] | None = None) -> C:
        """Made of values by their flat keys, of which a user gave some: unless told otherwise, all."""
        values = values or {}
        given = values.keys() if given is None else given
        parts: dict[str, dict[str, Any]] = {field.name: {} for field in dataclasses.fields(cls)}
        for name, key in cls.keys().items():
            assert key.group is not None
            parts[key.group][name] = values.get(name, key.default)
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(cls)}
        made = cls(**{name: kinds[name].of(part, part.keys() & set(given)) for name, part in parts.items()})
        check(cls.rules, *made.groups())
        return made

    def flat(self) -> dict[str, Any]:
        """The values of all keys."""
        return {key: value for group in self.groups() for key, value in group.flat().items()}

    def put(self, key: str, value: Any) -> None:
        """Changes a value in place, by its flat key."""
        setattr(getattr(self, str(self.keys()[key].group)), key, value)

    def replace(self: C, **values: Any) -> C:
        """A copy with other values, by their flat keys."""
        return self.of(self.flat() | values, self.given | values.keys())


# --- values ------------------------------------------------------------------------------------------


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


def _check_bounds(name: str, value: float, bounds: Mapping[str, Any]) -> None:
    minimum, maximum, below = (bounds[key] for key in ("minimum", "maximum", "below"))
    largest = _LARGEST_INT if isinstance(value, int) else _LARGEST_FLOAT
    maximum = largest if maximum is None else maximum
    if not math.isfinite(value):
        raise ConfigError(f"{name} must be finite, got {value!r}")
    if minimum is not None and value < minimum:
        raise ConfigError(f"{name} must be >= {minimum}, got {value!r}")
    if below is not None and value >= below:
        raise ConfigError(f"{name} must be < {below}, got {value!r}")
    if value > maximum:
        raise ConfigError(f"{name} must be <= {maximum}, got {value!r}")
    if minimum is None and value < -largest:
        raise ConfigError(f"{name} must be >= {-largest}, got {value!r}")


def _shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
