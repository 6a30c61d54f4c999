"""Settings as dataclasses: single keys, groups of them, and all settings of a task.

A group is a `Settings`; a task's settings are a `Config` of groups. Keys are flat: they are the names of the
fields in any group, and unique within a task. Imports ``engine.errors``.
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
"""Largest seed; it and its successor fit noise keys and torch's generators."""
_TYPES = {int: "an integer", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_LARGEST_INT, _LARGEST_FLOAT = 10**9, 1e30  # defaults of ``maximum``; both fit float32


class ConfigError(UserError, ValueError):
    """A setting is unknown, of the wrong type, out of range, or in conflict with another."""


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
    """Declare one key of a ``Settings``: a bool, a number or text, or None if the type allows it.

    Args:
        default: value if neither the yaml nor the command line gives one.
        help: description in one line, shown by ``--help``.
        choices: allowed values.
        minimum: smallest allowed value. ``None`` is exempt from all checks.
        maximum: largest allowed value; None: 10^9 for integers, 10^30 for other numbers.
        below: exclusive upper bound.
        pattern: regular expression that the whole text must match; ``help`` describes it in errors.
        path: whether the text may be a path, in which a leading ``~`` is a home folder.
    """
    metadata: dict[str, Any] = {"help": help, "choices": choices, "pattern": pattern, "path": path}
    metadata |= {"minimum": minimum, "maximum": maximum, "below": below}
    return dataclasses.field(default=default, metadata=metadata)


def seed_setting(help: str) -> Any:
    """Declare the key ``seed``."""
    return setting(0, help, minimum=0, maximum=LARGEST_SEED)


def device_setting() -> Any:
    """Declare the key ``device``, the same for every command."""
    return setting("auto", "auto, cpu, cuda or cuda:N", pattern=r"auto|cpu|cuda(:[0-9]+)?")


class Key(NamedTuple):
    """A setting of a `Settings` or `Config`."""

    group: str | None
    """The field of a `Config` with its group; None in a `Settings`."""
    heading: str
    type: Any
    default: Any
    metadata: Mapping[str, Any]


# --- groups ------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Settings:
    """A group of settings, which are checked at construction.

    Attributes:
        heading: heading of the group in ``--help``.
        removed: keys of earlier versions, with their replacements; see `config.load`.
        given: keys given by the user, even if the value is the default; for settings constructed in Python,
            those that differ from the default.

    Raises:
        ConfigError: a value is of the wrong type, not among its choices, out of bounds, not finite, or does
            not match its pattern.
    """

    heading: ClassVar[str] = "settings"
    removed: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        fields, types = dataclasses.fields(self), typing.get_type_hints(type(self))
        self.given = frozenset(f.name for f in fields if getattr(self, f.name) != f.default)
        for field in fields:
            name, value = field.name, getattr(self, field.name)
            choices, pattern = field.metadata["choices"], field.metadata["pattern"]
            _check_type(name, value, types[name])
            if value is None:
                continue
            if isinstance(value, float):  # numpy's float64 too, which yaml cannot write
                setattr(self, name, float(value))
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
        """The settings, in the order of declaration."""
        types = typing.get_type_hints(cls)
        return {
            f.name: Key(None, cls.heading, types[f.name], f.default, f.metadata)
            for f in dataclasses.fields(cls)
        }

    @classmethod
    def of(cls: type[S], values: Mapping[str, Any], given: Collection[str]) -> S:
        """Settings from values, of which a user gave some."""
        made = cls(**values)
        made.given = frozenset(given)
        return made

    def flat(self) -> dict[str, Any]:
        """The values of all keys."""
        return dataclasses.asdict(self)


# --- all settings of a task --------------------------------------------------------------------------


class Rule(NamedTuple):
    """A condition on several settings."""

    message: str
    """The error message, in which {key} is the value of a key."""
    holds: Callable[[View], bool]


def only_with(condition: str, applies: Callable[[View], bool], *keys: str) -> list[Rule]:
    """Rules that these keys are given only if they have an effect.

    Args:
        condition: the requirement, as text.
    """

    def rule(key: str) -> Rule:
        return Rule(
            f"{key} needs {condition}, got {key}={{{key}}}", lambda s: key not in s.given or applies(s)
        )

    return [rule(key) for key in keys]


class Effect(NamedTuple):
    """Keys that have an effect only with other settings."""

    condition: str
    """What they need, as text."""
    applies: Callable[[View], bool]
    keys: tuple[str, ...]


class View:
    """The settings of several groups, by flat keys."""

    def __init__(self, groups: Iterable[Settings]) -> None:
        self._groups = tuple(groups)
        self.given = frozenset[str]().union(*(group.given for group in self._groups))

    def __getattr__(self, key: str) -> Any:
        for group in self._groups:
            if hasattr(group, key):
                return getattr(group, key)
        raise AttributeError(key)


def check(rules: Iterable[Rule], *groups: Settings) -> None:
    """Checks rules between settings.

    Raises:
        ConfigError: the message of the first broken rule.
    """
    view = View(groups)
    for message, holds in rules:
        if not holds(view):
            keys = {key: _shown(value) for group in groups for key, value in group.flat().items()}
            raise ConfigError(message.format_map(keys))


def group(kind: type[Settings], **defaults: Any) -> Any:
    """Declare a group of a ``Config``, optionally with other defaults."""

    def make() -> Settings:
        return kind.of(defaults, ())

    return dataclasses.field(default_factory=make, metadata={"kind": kind, "defaults": defaults})


@dataclasses.dataclass
class Config:
    """All settings of a task. A subclass declares its groups with `group`, and its rules.

    Attributes:
        rules: rules between settings, checked by `of` and `replace`.
        effects: keys that other settings leave without effect, which is allowed; see `without_effect`.
        removed: keys of earlier versions, with their replacements; see `config.load`.

    Raises:
        ConfigError: see `Settings`; or a key is unknown, or a rule broken.
    """

    rules: ClassVar[Sequence[Rule]] = ()
    effects: ClassVar[Sequence[Effect]] = ()
    removed: ClassVar[Mapping[str, str]] = {}

    @property
    def given(self) -> frozenset[str]:
        """The keys given by the user, even if the value is the default."""
        return View(self.groups()).given

    def groups(self) -> Iterator[Settings]:
        return (getattr(self, field.name) for field in dataclasses.fields(self))

    @classmethod
    def keys(cls) -> dict[str, Key]:
        """The settings, in the order of declaration."""
        found: dict[str, Key] = {}
        for field in dataclasses.fields(cls):
            kind, defaults = field.metadata["kind"], field.metadata["defaults"]
            for name, key in kind.keys().items():
                assert name not in found, f"{name} is a key of two groups"
                found[name] = key._replace(group=field.name, default=defaults.get(name, key.default))
        return found

    @classmethod
    def of(cls: type[C], values: Mapping[str, Any] | None = None, given: Collection[str] | None = None) -> C:
        """Settings from values by flat keys, of which a user gave some; by default all."""
        values, keys = values or {}, cls.keys()
        if unknown := [name for name in values if name not in keys]:
            raise ConfigError(f"{unknown[0]}: unknown key")
        given = values.keys() if given is None else given
        parts: dict[str, dict[str, Any]] = {field.name: {} for field in dataclasses.fields(cls)}
        for name, key in keys.items():
            assert key.group is not None
            parts[key.group][name] = values.get(name, key.default)
        kinds = {field.name: field.metadata["kind"] for field in dataclasses.fields(cls)}
        made = cls(**{name: kinds[name].of(part, part.keys() & set(given)) for name, part in parts.items()})
        check(cls.rules, *made.groups())
        return made

    def flat(self) -> dict[str, Any]:
        """The values of all keys."""
        return {key: value for group in self.groups() for key, value in group.flat().items()}

    def without_effect(self, keys: Collection[str]) -> list[str]:
        """A sentence about those of the keys that have no effect with the other settings."""
        sentences, view = [], View(self.groups())
        for condition, applies, concerned in self.effects:
            idle = [key for key in concerned if key in keys]
            if idle and not applies(view):
                verb = "has" if len(idle) == 1 else "have"
                sentences.append(f"{', '.join(idle)} {verb} no effect without {condition}")
        return sentences

    def put(self, key: str, value: Any) -> None:
        """Sets a value in place, by its flat key."""
        setattr(getattr(self, str(self.keys()[key].group)), key, value)

    def replace(self: C, **values: Any) -> C:
        """A copy with other values, by flat keys."""
        return self.of(self.flat() | values, self.given | values.keys())


# --- values ------------------------------------------------------------------------------------------


def expand(name: str, path: str) -> str:
    """A path with a leading ``~`` or ``~USER`` expanded, in the encoding of the file system.

    Args:
        name: name of the setting, for the error.

    Raises:
        ConfigError: the home folder is unknown.
    """
    expanded = os.path.expanduser(os.fsdecode(path.encode(errors="surrogateescape")))
    if expanded.startswith("~"):
        raise ConfigError(f"{name} must not begin with ~ where its home folder is unknown, got {path!r}")
    return expanded


def named(wanted: Any) -> str:
    """A type of settings in words: "an integer or null"."""
    return " or ".join(_TYPES[kind] for kind in typing.get_args(wanted) or (wanted,))


def _check_type(name: str, value: Any, wanted: Any) -> None:
    kinds = typing.get_args(wanted) or (wanted,)
    if float in kinds:
        kinds = (*kinds, int)
    # bool is a subclass of int, but not a number
    if not (bool in kinds if isinstance(value, bool) else isinstance(value, kinds)):
        raise ConfigError(f"{name} must be {named(wanted)}, got {'null' if value is None else repr(value)}")


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
    """A value in the syntax of the command line."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return str(value)
