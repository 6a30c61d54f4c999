"""Checkpoints and models on disk: folders of one safetensors and one json file, complete or absent.

A folder is written under a temporary name, fsynced and renamed, so a kill at any moment leaves the previous
checkpoint whole. Nothing is pickled. Imports torch, safetensors and the standard library alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from dxmi_ext.errors import UserError

_CHECKPOINT = ("tensors.safetensors", "state.json")
_MODEL = ("model.safetensors", "config.json")


class CheckpointError(UserError, RuntimeError):
    """A checkpoint or model that is missing, torn or of an unknown format."""


def save(root: Path, iteration: int, state: Any, *, keep: int) -> Path:
    """Save a checkpoint as ROOT/step_XXXXXXXX and keep the last ``keep``.

    Later steps go too: they are the abandoned future of a run that was taken back to an earlier one.

    Args:
        root: the folder of all checkpoints of a run.
        iteration: counted over all phases of the run, so that a later checkpoint has the higher number.
        state: nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings, bools and None.
        keep: number of checkpoints to keep, this one among them; at least 1.

    Raises:
        TypeError: names the entry of ``state`` that cannot be saved.
    """
    if keep < 1:
        raise ValueError(f"keep: got {keep}, wants 1 or more")
    root = Path(root)
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, "state", tensors)
    target = root / f"step_{iteration:08d}"
    earlier = [path for step, path in sorted(_steps(root).items()) if step < iteration]
    for path in root.glob("step_*"):
        if path not in (*earlier, target):  # unfinished, or not of this run's past
            shutil.rmtree(path)
    _write_folder(target, _CHECKPOINT, tensors, tree)
    for path in earlier[: max(0, len(earlier) + 1 - keep)]:
        shutil.rmtree(path)
    return target


def load(path: Path, device: torch.device | str = "cpu") -> Any:
    """Read a checkpoint back: the state as saved, tuples as lists, tensors contiguous on ``device``.

    ``load_state_dict`` of modules and optimizers takes CPU tensors to where they belong.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    tensors, tree = _read_folder(Path(path), _CHECKPOINT, device)
    try:
        return _decode(tree, tensors)
    except KeyError as error:
        raise CheckpointError(f"{path}: state.json names a tensor that is not there: {error}") from error


def latest(root: Path) -> Path | None:
    """The checkpoint of the highest iteration in ``root``, if there is one."""
    steps = _steps(Path(root))
    return steps[max(steps)] if steps else None


def save_model(path: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Save final networks as folder ``path``; equal tensors and config give equal bytes."""
    _write_folder(Path(path), _MODEL, module.state_dict(), config)


def load_model_state(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, config) saved by ``save_model``.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    return _read_folder(Path(path), _MODEL, device)


def _steps(root: Path) -> dict[int, Path]:
    """Complete checkpoints by iteration."""
    return {
        int(match[1]): path
        for path in root.glob("step_*")
        if (match := re.fullmatch(r"step_(\d{8,})", path.name))
        and all((path / name).is_file() for name in _CHECKPOINT)
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


def _write_folder(path: Path, names: tuple[str, str], tensors: dict[str, Tensor], tree: Any) -> None:
    """Write both files, then make them appear as ``path`` at once."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    # safetensors refuses shared and strided memory
    dense = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(dense, unfinished / names[0])
    (unfinished / names[1]).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
    for written in (unfinished / names[0], unfinished / names[1], unfinished):
        _fsync(written)
    shutil.rmtree(path, ignore_errors=True)  # a rename cannot replace a folder that has content
    unfinished.rename(path)
    _fsync(path.parent)


def _read_folder(
    path: Path, names: tuple[str, str], device: torch.device | str
) -> tuple[dict[str, Tensor], Any]:
    try:
        tensors = safetensors.torch.load_file(path / names[0], device=str(device))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path / names[0]}: missing or corrupt: {error}") from error
    try:
        tree = json.loads((path / names[1]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path / names[1]}: missing or corrupt: {error}") from error
    # a copy of its own, for the file's memory map stays neither writable nor there for ever
    return {name: tensor.clone() for name, tensor in tensors.items()}, tree


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
