"""Checkpoints and models on disk: folders of one safetensors and one json file, complete or absent.

A checkpoint has also a manifest of its files' sizes and checksums, so that damage is found whatever it hits.
Nothing is pickled. Imports torch, safetensors, ``dxmi_ext.files`` and the standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dxmi_ext import files
from dxmi_ext.errors import UserError

FORMAT = 2
_CHECKPOINT = ("tensors.safetensors", "state.json")
_MODEL = ("model.safetensors", "config.json")
_MANIFEST = "manifest.json"


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model that is missing, damaged or of an unknown format."""


def save(root: Path, iteration: int, state: Any, *, keep: int, spare: int | None = None) -> Path:
    """Save a checkpoint as ROOT/step_XXXXXXXX, then ``prune``.

    Args:
        root: the folder of all checkpoints of a run.
        iteration: counted over all phases of the run, so that a later checkpoint has the higher number.
        state: nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings, bools and None.
        keep: number of checkpoints to keep, this one among them; at least 1.
        spare: iteration of a checkpoint that stays whatever its age.

    Raises:
        TypeError: names the entry of ``state`` that cannot be saved.
        OSError: it could not be written; the checkpoints of before are as they were.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, wants 1 or more")
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    target = Path(root) / f"step_{iteration:08d}"
    with files.folder(target) as folder:
        _write(folder, _CHECKPOINT, tensors, tree)
        manifest = {"format": FORMAT, "files": {name: _facts(folder / name) for name in _CHECKPOINT}}
        _write_json(folder / _MANIFEST, manifest)
    prune(root, iteration, keep=keep, spare=spare)
    return target


def prune(root: Path, iteration: int, *, keep: int, spare: int | None = None) -> None:
    """Keep the last ``keep`` checkpoints up to an iteration, and that of iteration ``spare``.

    Later ones go too: they are the abandoned future of a run that was taken back to an earlier one.
    """
    steps = _steps(root)
    kept = sorted(step for step in steps if step <= iteration)[-keep:]
    for step in sorted(steps.keys() - {*kept, spare}, reverse=True):
        files.remove_folder(steps[step])


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a checkpoint back: the state as saved, tuples as lists, tensors contiguous on ``device``.

    ``load_state_dict`` of modules and optimizers takes CPU tensors to where they belong.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    _verify(path)
    tensors, tree = _read(path, _CHECKPOINT, device)
    return _decode(tree, tensors)


def load_latest(
    root: Path, warn: Callable[[str], None], *, until: int | None = None
) -> tuple[Path, Any] | None:
    """Read the last whole checkpoint in ``root``, if there is any at all; damaged ones are skipped.

    Args:
        until: look at none of a later iteration.
        warn: is told of each one skipped, and why.

    Raises:
        CheckpointError: all are damaged. They stay: a fresh start would be the end of them.
    """
    steps = {step: path for step, path in _steps(root).items() if until is None or step <= until}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            return path, load(path)
        except CheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    if steps:
        raise CheckpointError(f"{root}: every checkpoint is damaged; resume=never starts afresh")
    return None


def nbytes(state: Any) -> int:
    """Bytes of a state's tensors: about what a checkpoint of it takes."""
    tensors: dict[str, Tensor] = {}
    _encode(state, "state", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def save_model(path: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Save final networks as folder ``path``; equal tensors and config give equal bytes."""
    with files.folder(Path(path)) as folder:
        _write(folder, _MODEL, module.state_dict(), config)


def load_model_state(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, config) saved by ``save_model``.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    return _read(Path(path), _MODEL, device)


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoints by iteration, damaged ones among them."""
    return {
        int(match[1]): path
        for path in Path(root).glob("step_*")
        if (match := re.fullmatch(r"step_(\d{8,})", path.name))
    }


def _encode(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The json form of a state; its tensors move to ``tensors``, named by their place."""
    if isinstance(node, Tensor):
        while name in tensors:  # keys 0 and "0" give the same name
            name += "'"
        tensors[name] = node
        return {"$tensor": name}
    if isinstance(node, dict):
        if wrong := [key for key in node if type(key) not in (str, int)]:
            raise TypeError(f"{name}: got the key {wrong[0]!r}, wants str or int")
        items = [(key, _encode(value, f"{name}.{key}", tensors)) for key, value in node.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in node)
        return dict(items) if plain else {"$items": items}
    if isinstance(node, list | tuple):
        return [_encode(value, f"{name}.{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"{name}: got a {type(node).__name__}, wants a tensor, number, string, bool, None, dict or list"
    )


def _decode(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, list):
        return [_decode(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    items = node["$items"] if "$items" in node else node.items()
    return {key: _decode(value, tensors) for key, value in items}


def _write(folder: Path, names: tuple[str, str], tensors: dict[str, Tensor], tree: Any) -> None:
    # safetensors refuses shared and strided memory
    dense = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        safetensors.torch.save_file(dense, folder / names[0])
    except SafetensorError as error:  # what it makes of an OSError
        raise OSError(f"{folder / names[0]}: {error}") from error
    _write_json(folder / names[1], tree)


def _write_json(path: Path, tree: Any) -> None:
    with files.naming(path):
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def _read(path: Path, names: tuple[str, str], device: torch.device | str) -> tuple[dict[str, Tensor], Any]:
    try:
        tensors = safetensors.torch.load_file(path / names[0], device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / names[0]}: missing or corrupt: {error}") from error
    # a copy of its own, for the file's memory map stays neither writable nor there for ever
    return {name: tensor.clone() for name, tensor in tensors.items()}, _read_json(path / names[1])


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or corrupt: {error}") from error


def _verify(path: Path) -> None:
    """Compare a checkpoint's files with its manifest."""
    manifest = _read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise CheckpointError(f"{path / _MANIFEST}: got format {found!r}, this version reads {FORMAT}")
    for name in _CHECKPOINT:
        file = path / name
        try:
            found, wanted = _facts(file), manifest["files"][name]
            if found["bytes"] != wanted["bytes"]:
                raise CheckpointError(f"{file}: has {found['bytes']} bytes, was saved with {wanted['bytes']}")
            if found["sha256"] != wanted["sha256"]:
                raise CheckpointError(f"{file}: its content is not what was saved: another sha256")
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from error
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{path / _MANIFEST}: does not tell size and sha256 of {name}") from error


def _facts(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
