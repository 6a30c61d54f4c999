"""Nested states on disk: their tensors in safetensors files, the rest as json. Nothing is pickled.

Imports torch, safetensors, the standard library and the engine's modules errors, files and sharding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.errors import CheckpointError
from dxmi_ext.engine.storage import files


@dataclass
class StoredTensor:
    """A tensor in an open checkpoint, which can be read in part.

    Attributes:
        shape: shape of the whole tensor.
        pieces: (first row, number of rows, file) of each piece; a single one unless sharded.
    """

    name: str
    shape: list[int]
    pieces: list[tuple[int, int, Any]]

    def read(self, first: int | None = None, count: int | None = None) -> Tensor:
        """`count` rows from `first` on, on the CPU; by default all rows."""
        if first is None or count is None:
            if len(self.pieces) == 1:
                return self.pieces[0][2].get_tensor(self.name).clone()
            first, count = 0, self.shape[0]
        parts: list[Tensor] = []
        for start, rows, file in self.pieces:
            low, high = max(first, start), min(first + count, start + rows)
            if low < high or not parts:  # the first piece gives dtype and shape even if no row is requested
                parts.append(file.get_slice(self.name)[low - start : max(high, low) - start])
        return torch.cat(parts)


def encode(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """The json form of a state; its tensors go to ``tensors``, named by their path."""
    if isinstance(node, Tensor):
        while name in tensors:  # keys 0 and "0" have the same name
            name += "'"
        tensors[name] = node
        return {"$tensor": name}
    if isinstance(node, dict):
        if wrong := [key for key in node if type(key) not in (str, int)]:
            raise TypeError(f"keys of {name} must be str or int, got {wrong[0]!r}")
        items = [(key, encode(value, f"{name}.{key}", tensors)) for key, value in node.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in node)
        return dict(items) if plain else {"$items": items}
    if isinstance(node, list | tuple):
        return [encode(value, f"{name}.{i}", tensors) for i, value in enumerate(node)]
    if node is None or isinstance(node, bool | int | float | str):
        return node
    raise TypeError(
        f"{name} must be a tensor, number, string, bool, None, dict or list, got {type(node).__name__}"
    )


def decode(node: Any, tensors: Mapping[str, Any]) -> Any:
    if isinstance(node, list):
        return [decode(value, tensors) for value in node]
    if not isinstance(node, dict):
        return node
    if "$tensor" in node:
        return tensors[node["$tensor"]]
    items = node["$items"] if "$items" in node else node.items()
    return {key: decode(value, tensors) for key, value in items}


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    # safetensors rejects shared and strided memory
    dense = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in zip(tensors, sharding.local(tensors.values()), strict=True)
    }
    try:
        safetensors.torch.save_file(dense, path, metadata)
    except SafetensorError as error:  # raised in place of an OSError
        raise OSError(f"{path}: {error}") from error


def open_tensors(path: Path, names: list[str]) -> dict[str, StoredTensor]:
    """The tensors in some files, by name; a file stays open as long as one of its tensors is referenced."""
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        try:
            file = _safe_open(path / name)
            placed = json.loads((file.metadata() or {}).get("rows", "{}"))
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path / name}: missing or corrupt: {error}") from error
        for key in file.keys():  # noqa: SIM118 it is not a dict
            shape = list(file.get_slice(key).get_shape())
            first, total = placed.get(key, (0, shape[0] if shape else 1))
            rows = shape[0] if shape else 1
            whole = tensors.setdefault(key, StoredTensor(key, [total, *shape[1:]] if shape else [], []))
            whole.pieces.append((first, rows, file))
    for key, tensor in tensors.items():
        if tensor.shape and sum(rows for _, rows, _ in tensor.pieces) != tensor.shape[0]:
            raise CheckpointError(f"{path}: {key}: some of its {tensor.shape[0]} rows are missing")
    return tensors


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a file; empty if it has none, or cannot be read."""
    try:
        return dict(_safe_open(path).metadata() or {})
    except (OSError, SafetensorError):
        return {}


def _safe_open(path: Path) -> Any:
    try:
        str(path).encode()
    except UnicodeEncodeError:  # safetensors requires UTF-8 names, so open the file by descriptor
        opened = os.open(path, os.O_RDONLY)
        try:
            return safe_open(f"/proc/self/fd/{opened}", framework="pt")
        finally:
            os.close(opened)
    return safe_open(path, framework="pt")


def write_json(path: Path, tree: Any) -> None:
    with files.naming(path):
        path.write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: missing or corrupt: {error}") from error
