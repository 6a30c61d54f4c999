"""Checkpoints and models on disk: folders of safetensors and json files, complete or absent.

A checkpoint also has a manifest of its files' sizes and checksums, so that any damage is detected. Every rank
writes its rows of sharded tensors to its own file, whose header lists them; any number of ranks can read
them, from one file system. `tensor_files` writes the files. Imports torch and the engine.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.errors import CheckpointError, UserError
from dxmi_ext.engine.storage import files, folders, tensor_files

FORMAT = 2
_CHECKPOINT = _, _STATE = ("tensors.safetensors", "state.json")
_MANIFEST = "manifest.json"
_SHARD = "tensors-{:05d}-of-{:05d}.safetensors"
_MODEL = ("model.safetensors", "config.json")
_ALONE = Ranks()


def save(
    root: Path, iteration: int, state: Any, *, keep: int, spare: int | None = None, ranks: Ranks = _ALONE
) -> Path:
    """Save a checkpoint as ROOT/step_XXXXXXXX, then ``prune``.

    Args:
        root: folder of a run's checkpoints.
        iteration: iteration over all phases of the run, so that later checkpoints have higher numbers.
        state: nested dicts (keys: str or int), lists and tuples of tensors, numbers, strings, bools and None.
            The first rank's state is saved, with every rank's rows of sharded tensors.
        keep: number of checkpoints to keep, including this one; at least 1.
        spare: iteration of a checkpoint that is kept whatever its age.
        ranks: ranks, all of which call this; only the first writes unless tensors are sharded.

    Raises:
        TypeError: names the entry of ``state`` that cannot be saved.
        OSError: writing failed; earlier checkpoints are unchanged.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    tensors: dict[str, Tensor] = {}
    tree = tensor_files.encode(state, "state", tensors)
    target = Path(root) / _name(iteration)
    if any(map(sharding.is_sharded, tensors.values())):
        _save_shards(target, tensors, tree, ranks)
    elif ranks.first:
        with files.folder(target, folders.CHECKPOINT) as folder:
            _write(folder, _CHECKPOINT, tensors, tree)
            _write_manifest(folder, {name: _facts(folder / name) for name in _CHECKPOINT})
    if ranks.first:
        prune(root, iteration, keep=keep, spare=spare)
    return target


def _save_shards(target: Path, tensors: dict[str, Tensor], tree: Any, ranks: Ranks) -> None:
    """If a rank dies in here, the first rank notices and leaves everything as it was."""
    name = _SHARD.format(ranks.rank, ranks.world_size)
    rows = {key: sharding.rows(tensor) for key, tensor in tensors.items() if sharding.is_sharded(tensor)}
    mine = {key: tensor for key, tensor in tensors.items() if ranks.first or key in rows}
    making = (
        files.folder(target, folders.CHECKPOINT) if ranks.first else nullcontext(files.unfinished(target))
    )
    with making as folder:
        ranks.agree(None)  # the folder exists
        placed = {key: [first, tensors[key].shape[0]] for key, (first, _) in rows.items()}
        tensor_files.write_tensors(folder / name, mine, {"rows": json.dumps(placed, sort_keys=True)})
        files.sync(folder / name)
        facts = ranks.exchange([name, _facts(folder / name)])
        if ranks.first:
            tensor_files.write_json(folder / _STATE, tree)
            _write_manifest(folder, {**dict(facts), _STATE: _facts(folder / _STATE)})


def adopt(
    source: Path,
    root: Path,
    iteration: int,
    changes: dict[str, Any],
    *,
    keep: int,
    spare: int | None = None,
) -> None:
    """Copy a checkpoint to ROOT/step_XXXXXXXX, possibly itself, with changes to entries of its state without
    tensors; then ``prune``. Called on one rank only."""
    facts = tensor_files.read_json(source / _MANIFEST)["files"]
    with files.folder(root / _name(iteration), folders.CHECKPOINT) as folder:
        for name in facts.keys() - {_STATE}:
            shutil.copyfile(source / name, folder / name)
        tensor_files.write_json(
            folder / _STATE,
            tensor_files.read_json(source / _STATE) | tensor_files.encode(changes, "changes", {}),
        )
        _write_manifest(folder, facts | {_STATE: _facts(folder / _STATE)})
    prune(root, iteration, keep=keep, spare=spare)


def prune(root: Path, iteration: int, *, keep: int, spare: int | None = None) -> None:
    """Keep the last ``keep`` checkpoints up to an iteration, and the one of iteration ``spare``.

    Later ones are removed too: the run has gone back to an earlier checkpoint.
    """
    steps = _steps(root)
    kept = sorted(step for step in steps if step <= iteration)[-keep:]
    for step in sorted(steps.keys() - {*kept, spare}, reverse=True):
        files.remove_folder(steps[step], folders.CHECKPOINT)


def load(path: Path, device: torch.device | str = "cpu", *, ranks: Ranks = _ALONE, lazy: bool = False) -> Any:
    """Read a checkpoint: the state as saved, with tuples as lists and whole contiguous tensors on ``device``.

    ``load_state_dict`` of modules and optimizers moves CPU tensors to the right device.

    Args:
        path: folder of the checkpoint.
        device: device of the tensors.
        ranks: ranks, all of which call this and share the checks of the files.
        lazy: return each tensor as a `StoredTensor`, from which `sharding.like` and `load_` read rows.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    # All ranks exchange what they find, so that they agree on what is damaged.
    if found := [fault for fault in ranks.exchange(_fault(path, ranks)) if fault]:
        raise CheckpointError(found[0])
    names = [name for name in tensor_files.read_json(path / _MANIFEST)["files"] if name != _STATE]
    stored = tensor_files.open_tensors(path, names)
    tree = tensor_files.read_json(path / _STATE)
    return tensor_files.decode(
        tree, stored if lazy else {key: t.read().to(device) for key, t in stored.items()}
    )


def check_path(name: str, path: Path) -> None:
    """Checks that a setting names the folder of a checkpoint, whether it is intact or not.

    Raises:
        CheckpointError: it does not, with what it names instead.
    """
    if (path / _MANIFEST).is_file():
        return
    if not path.is_dir():
        why = "is a file" if path.exists() else "does not exist"
    elif steps := _steps(path / "checkpoints"):
        why = f"is a run; its last checkpoint is {steps[max(steps)]}"
    else:
        why = f"has no {_MANIFEST}"
    wanted = f"auto, never or a checkpoint such as RUN/checkpoints/{_name(1000)}"
    raise CheckpointError(f"{name} must be {wanted}, got {str(path)!r}, which {why}")


def load_latest(
    root: Path,
    warn: Callable[[str], None],
    *,
    until: int | None = None,
    ranks: Ranks = _ALONE,
    lazy: bool = False,
) -> tuple[Path, Any] | None:
    """Read the last intact checkpoint in ``root``, or return None if there is none; damaged ones are skipped.

    Args:
        root: folder of a run's checkpoints.
        warn: called with a message for each skipped checkpoint.
        until: last iteration to consider.
        ranks, lazy: see `load`.

    Raises:
        CheckpointError: all are damaged. They are kept, since a fresh start would remove them.
    """
    steps = {step: path for step, path in _steps(root).items() if until is None or step <= until}
    for _, path in sorted(steps.items(), reverse=True):
        try:
            return path, load(path, ranks=ranks, lazy=lazy)
        except CheckpointError as error:
            warn(f"skipping a damaged checkpoint: {error}")
    if steps:
        raise CheckpointError(f"{root}: every checkpoint is damaged; resume=never starts afresh")
    return None


def nbytes(state: Any) -> int:
    """Bytes of a state's tensors, about the size of its checkpoint."""
    tensors: dict[str, Tensor] = {}
    tensor_files.encode(state, "state", tensors)
    return sum(tensor.nbytes for tensor in tensors.values())


def save_model(path: Path, module: nn.Module, config: dict[str, Any]) -> None:
    """Save final networks as folder ``path``; equal tensors and configs give equal bytes.

    Raises:
        TypeError: the module has extra state that is not a tensor.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"networks must have no state but tensors, got {name}, a {type(value).__name__}")
    with files.folder(Path(path), folders.MODEL) as folder:
        _write(folder, _MODEL, state, config)


def is_model_of_others(path: Path) -> bool:
    """Whether another library saved the model.safetensors in a folder: ours have no metadata."""
    file = Path(path) / _MODEL[0]
    return file.is_file() and bool(tensor_files.metadata_of(file))


def load_model_state(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read (tensors, config) saved by ``save_model``.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    tensors = {
        name: tensor.read().to(device)
        for name, tensor in tensor_files.open_tensors(Path(path), [_MODEL[0]]).items()
    }
    return tensors, load_model_about(path)


def load_model_about(path: Path) -> dict[str, Any]:
    """Read the config that ``save_model`` saved, without the tensors.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    about = tensor_files.read_json(Path(path) / _MODEL[1])
    if not isinstance(about, dict):
        raise CheckpointError(f"{Path(path) / _MODEL[1]}: expected a JSON object, got {type(about).__name__}")
    return about


@contextmanager
def fitting(directory: Path) -> Iterator[None]:
    """Turns errors raised within, while networks are built from config.yaml and load model/, into one error.

    Raises:
        CheckpointError: config.yaml and model/ do not match.
    """
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError) as error:
        raise _misfit(directory, f"{type(error).__name__}: {error}") from error
    except (RuntimeError, TypeError, ValueError) as error:
        raise _misfit(directory, str(error)) from error


def _misfit(directory: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{directory}: config.yaml does not fit the networks in model/: {textwrap.shorten(why, 300)}"
    )


def _name(iteration: int) -> str:
    return f"step_{iteration:08d}"


def _steps(root: Path) -> dict[int, Path]:
    """Checkpoints by iteration, including damaged ones."""
    return {
        int(match[1]): path
        for path in Path(root).glob("step_*")
        if (match := re.fullmatch(r"step_(\d{8,})", path.name)) and _is_ours(path)
    }


def _is_ours(path: Path) -> bool:
    """False for the remains of a removed checkpoint that hold only files of others."""
    return path.is_dir() and (files.holds(path, folders.CHECKPOINT) or not any(path.iterdir()))


def _write(folder: Path, names: tuple[str, str], tensors: dict[str, Tensor], tree: Any) -> None:
    tensor_files.write_tensors(folder / names[0], tensors)
    tensor_files.write_json(folder / names[1], tree)


def _write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    tensor_files.write_json(folder / _MANIFEST, {"format": FORMAT, "files": facts})


def _fault(path: Path, ranks: Ranks) -> str | None:
    """The error in a checkpoint's manifest or in the files that this rank checks, if any."""
    try:
        manifest = tensor_files.read_json(path / _MANIFEST)
    except CheckpointError as error:
        return str(error)
    number = manifest.get("format") if isinstance(manifest, dict) else manifest
    if number != FORMAT or not isinstance(manifest, dict):
        return f"{path / _MANIFEST}: format must be {FORMAT}, got {number!r}"
    entries = manifest.get("files")
    entries = entries if isinstance(entries, dict) else {}
    for name in sorted({_STATE, *entries})[ranks.rank :: ranks.world_size]:
        file = path / name
        try:
            found, wanted = _facts(file), entries[name]
            if found["bytes"] != wanted["bytes"]:
                return f"{file}: expected {wanted['bytes']} bytes, got {found['bytes']}"
            if found["sha256"] != wanted["sha256"]:
                return f"{file}: its content has changed since it was saved (sha256)"
        except OSError as error:
            return f"{file}: cannot be read: {error.strerror}"
        except (KeyError, TypeError):
            return f"{path / _MANIFEST}: size and sha256 of {name} are missing"
    return None


def _facts(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
