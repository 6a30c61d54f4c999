"""Settings as text: reading yaml and ``key=value`` of the command line, writing, and listing.

The type of a key parses its value, the same way for both sources. Imports ``engine.settings`` and
``engine.storage.files``, and PyYAML (extra ``train``) where yaml is read or written.
"""

from __future__ import annotations

import difflib
import functools
import json
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, cast

from dxmi_ext.engine import settings
from dxmi_ext.engine.settings import Config, ConfigError, Settings
from dxmi_ext.engine.storage import files

C = TypeVar("C", bound=Settings | Config)

_LONGEST_YAML = 2**20  # bytes


def load(cls: type[C], yaml_path: str | Path | None, overrides: Sequence[str] = ()) -> C:
    """Read settings: the class's defaults, updated by the yaml, then by the overrides in order.

    Numbers are decimal (010 is 10, 1_000 is 1000), and an integer may be written as 1e3. ``given`` has the
    keys of the overrides, and those of the yaml that differ from the default, as a run's config.yaml has all
    keys; an override with the default takes back what the yaml gave. Keys in ``cls.removed``, from earlier
    versions, are ignored in a yaml, with a note for each.

    Args:
        cls: settings of a task or a command.
        yaml_path: file with a mapping of keys to values, each key once; None: the defaults.
        overrides: texts ``key=value``; an empty value or null is None.

    Raises:
        ConfigError: names the key, its requirement and its value; for an unknown key, the nearest known one;
            for a removed key among the overrides, its replacement.
    """
    keys = cls.keys()
    values = {name: key.default for name, key in keys.items()}
    given = set()
    for name, text in _read_yaml(yaml_path) if yaml_path else []:
        if name in cls.removed:
            _tell_removed(str(yaml_path), name, cls.removed[name])
            continue
        values[name] = _read_value(name, text, keys)
        if values[name] != keys[name].default:
            given.add(name)
    for name, text in map(_read_override, overrides):
        if name in cls.removed:
            raise ConfigError(f"{name} is no longer a setting; {cls.removed[name]}")
        values[name] = _read_value(name, text, keys)
        if name in given and values[name] == keys[name].default:
            given.discard(name)  # the yaml's value is taken back
        else:
            given.add(name)
    return cast(C, cls.of(values, given))


def peek(yaml_path: str | Path, key: str, default: Any = None) -> Any:
    """The text of one key of a yaml file, whose class of settings is not known yet."""
    return dict(_read_yaml(yaml_path)).get(key, default)


def to_yaml(cfg: Settings | Config) -> str:
    """The resolved settings as yaml, in the order of declaration."""
    text: str = _import_yaml().safe_dump(cfg.flat(), sort_keys=False, allow_unicode=True)
    return text


def save(cfg: Settings | Config, path: str | Path) -> None:
    """Write the resolved settings atomically."""
    files.write_text(path, to_yaml(cfg))


def describe(cfg: Settings | Config) -> str:
    """List every key with its help and its value in ``cfg`` as default, one aligned line per key, under the
    heading of its group."""
    values, groups = cfg.flat(), dict[str, list[tuple[str, str]]]()
    for name, key in cfg.keys().items():
        value, choices = values[name], key.metadata["choices"]
        shown = value if isinstance(value, str) else json.dumps(value)
        allowed = f" ({' | '.join(map(str, choices))})" if choices else ""
        rows = groups.setdefault(key.heading, [])
        rows.append((f"{name}={shown}", key.metadata["help"] + allowed))
    width = max(len(left) for rows in groups.values() for left, _ in rows)
    return "\n\n".join(
        "\n".join([f"{heading}:", *(f"  {left:<{width}}  {right}" for left, right in rows)])
        for heading, rows in groups.items()
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name, with the nearest known one; empty if none is near."""
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]}?" if nearest else ""


@functools.cache  # once, although a command reads a run's config.yaml several times
def _tell_removed(path: str, name: str, instead: str) -> None:
    from dxmi_ext.engine.output import runlog  # imported here, since it requires tqdm

    runlog.note(f"{path}: {name} is no longer a setting and is ignored; {instead}")


def _import_yaml() -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ConfigError("reading settings needs PyYAML: pip install 'dxmi_ext[train]'") from error
    return yaml


def _read_yaml(path: str | Path) -> list[tuple[str, str | None]]:
    """The keys and texts of a yaml file that holds one mapping; null is None."""
    yaml = _import_yaml()
    try:
        with open(path, "rb") as file:
            content = file.read(_LONGEST_YAML + 1)
        if len(content) > _LONGEST_YAML:
            raise ConfigError(f"{path} must be at most {_LONGEST_YAML} bytes of yaml")
        # Nodes, not values: the key's type parses the text, not YAML 1.1.
        root = yaml.compose(content.decode("utf-8-sig"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as yaml: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: cannot be read as yaml: it is nested too deeply") from error
    if not isinstance(root, yaml.MappingNode):
        got = {yaml.ScalarNode: "text", yaml.SequenceNode: "a list"}.get(type(root), "an empty file")
        raise ConfigError(f"{path} must be a mapping of keys to values, got {got}")
    pairs: dict[str, str | None] = {}
    for key, value in root.value:
        if not (isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)):
            got = "a list" if isinstance(value, yaml.SequenceNode) else "a mapping"
            raise ConfigError(f"{path}: {_shown(key)} must be a single value, got {got}")
        if key.value in pairs:
            raise ConfigError(f"{path}: {key.value} must be given once, got two values")
        pairs[key.value] = None if value.tag.endswith(":null") else value.value
    return list(pairs.items())


def _shown(key: Any) -> str:
    return key.value if isinstance(key.value, str) else "a key"


def _read_override(override: str) -> tuple[str, str | None]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"a setting must be key=value, got {override!r}")
    return key, None if text in ("", "null") else text


def _read_value(name: str, text: str | None, keys: dict[str, settings.Key]) -> Any:
    """A value of a key's type: one of ``_READERS``, possibly optional."""
    if name not in keys:
        hint = did_you_mean(name, keys) or "; --help lists the keys"
        raise ConfigError(f"{name if name.isprintable() else repr(name)}: unknown key{hint}")
    wanted = keys[name].type
    kind, *others = typing.get_args(wanted) or (wanted,)
    if text is None and NoneType in others:
        return None
    try:
        if text is not None:
            return _READERS[kind](text)
    except ValueError:
        pass
    got = "null" if text is None else repr(text)
    raise ConfigError(f"{name} must be {settings.named(wanted)}, got {got}")


def _read_int(text: str) -> int:
    if not text.isascii():  # int() accepts the digits of all scripts
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
    if "\0" in text:  # not allowed in a path
        raise ValueError
    text.encode(errors="surrogateescape")  # what is neither a character nor a byte is a ValueError
    return text


_READERS: dict[type, Callable[[str], Any]]
_READERS = {int: _read_int, float: _read_float, bool: _read_bool, str: _read_text}
