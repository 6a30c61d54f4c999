"""Training from Python: runs of a trainer in a folder, batches of data in memory, saved networks.

Runs work as those of the command ``dxmi``: the same files, exact resuming, rollbacks, signals and ranks.
Imports torch, numpy, the engine and the method; PyYAML is required by `fit`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from dxmi_ext.engine import course
from dxmi_ext.engine.arguments import at_least, of_type
from dxmi_ext.engine.compute import sharding
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.errors import first_few
from dxmi_ext.engine.output.runlog import TIMING_FIELDS, note, read_metrics
from dxmi_ext.engine.run import Run
from dxmi_ext.engine.run_settings import PYTHON, RunnableConfig, RunSettings
from dxmi_ext.engine.runs import config, identity
from dxmi_ext.engine.runs.signals import Stopped
from dxmi_ext.engine.settings import ConfigError, group
from dxmi_ext.engine.storage import checkpoint, files, folders
from dxmi_ext.method.denoising import Pretrainer, PretrainerSettings
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import DxMISettings
from dxmi_ext.method.stepper import Stepper
from dxmi_ext.method.trainer import DxMITrainer

M = TypeVar("M", bound=nn.Module)
Data = Tensor | Sequence[Tensor]
"""This rank's rows of a batch: data [B, *], or data and labels [B]."""

_SHOWN = 4  # tensors of other shapes in an error


@dataclasses.dataclass
class _FitConfig(RunnableConfig):
    """What identifies a run of `fit` when it resumes."""

    run: RunSettings = group(RunSettings, task=PYTHON)
    execution: ExecutionSettings = group(ExecutionSettings)


@dataclasses.dataclass
class _FitPretrainerConfig(_FitConfig):
    pretraining: PretrainerSettings = group(PretrainerSettings)


@dataclasses.dataclass
class _FitDxMIConfig(_FitConfig):
    algorithm: DxMISettings = group(DxMISettings)
    langevin: LangevinSettings = group(LangevinSettings)


def fit(
    trainer: Stepper,
    batches: Callable[[int], Data] | Iterable[Data],
    *,
    output: str | os.PathLike[str],
    resume: str | os.PathLike[str] = "auto",
    checkpoint_every: int = 1000,
    keep_checkpoints: int = 2,
    log_every: int = 50,
    picture: Callable[[IO[bytes]], None] | None = None,
    picture_every: int = 1000,
    tensorboard: bool = False,
    wandb: str | None = None,
) -> dict[str, Any]:
    """Trains to the trainer's last iteration, in a folder, with progress, logs and checkpoints.

    If the folder already holds this run, training resumes from its last checkpoint; if that run is finished,
    the trainer gets its final state and nothing is trained. So a script with several calls of `fit`, each
    with its own folder, can be stopped at any time and started again. Ctrl-C and SIGTERM finish the
    iteration and save a checkpoint.

    A run is known by the trainer's settings, such as `DxMISettings` or the numbers given to a `Pretrainer`,
    the trainer's seed, the batch size and the fingerprint of data given by `shuffled`, which have to be the
    same when it resumes; a higher number of iterations continues it. Batches without a fingerprint, such as a
    DataLoader's, are not compared: use a new folder for other data. Nor are the order of `shuffled`,
    functions such as ``draw_levels``, and networks, except that the weights and the schedule must fit.

    Args:
        trainer: `Pretrainer`, `DxMITrainer` or another `Stepper`; its ``ranks`` share the batches.
        batches: iteration -> this rank's rows of the batch, data [B, *] or (data, labels [B]). Such a
            function of the iteration, e.g. made by `shuffled`, is what makes resuming exact. If it has a
            method ``fingerprint``, () -> str, the run identifies its data by it. Or an iterable
            of batches, such as a DataLoader, which is iterated again after its end; a resumed run starts
            at its first batch. Batches are moved to the trainer's device.
        output: folder of the run: config.yaml, metrics.jsonl, summary.json, checkpoints/, pictures/, and
            model/ with ``trainer.averaged``, for `load`.
        resume: ``auto``; ``never`` removes an earlier run from the folder first; or the path of a checkpoint.
        checkpoint_every: iterations between checkpoints.
        keep_checkpoints: number of checkpoints kept.
        log_every: iterations between lines of metrics.jsonl.
        picture: writes a png to an open file, e.g. by matplotlib's ``figure.savefig(file, format="png")``.
        picture_every: iterations between pictures in pictures/.
        tensorboard: also log to tb/ for tensorboard.
        wandb: project of Weights & Biases to log to as well.

    Returns:
        The content of summary.json; ``metrics`` has the last values logged. Empty on ranks other than the
        first.

    Raises:
        TypeError: an argument is of another type.
        ConfigError: a setting is invalid, a batch or a network does not fit, or the folder holds a run of
            other settings or data.
        FolderError: the folder holds files of others.
        CheckpointError: the checkpoint to resume from is missing, damaged or of other networks.
        Diverged: steps are still not finite after all rollbacks.
        Stopped: a KeyboardInterrupt, after Ctrl-C or SIGTERM; the state is saved.
    """
    of_type("trainer", trainer, Stepper, "a trainer such as DxMITrainer")
    for name, path in (("output", output), ("resume", resume)):
        of_type(name, path, (str, os.PathLike), "a str or PathLike")
        if not os.fspath(path):
            raise ConfigError(f"{name} must be a path, got ''")
    if not (picture is None or callable(picture)):
        raise TypeError(f"picture must be a function of a file, got {type(picture).__name__}")
    if isinstance(batches, Shuffled):
        _check_rows(batches, trainer.ranks)
    first, source = _reader(batches)
    rows = len(_parts(first, trainer)[0]) * trainer.ranks.world_size
    settings: dict[str, Any] = {"output": os.fspath(output), "resume": os.fspath(resume)}
    settings |= {"seed": trainer.seed}
    settings |= {"checkpoint_every": checkpoint_every, "keep_checkpoints": keep_checkpoints}
    settings |= {"log_every": log_every, "tensorboard": tensorboard, "wandb": wandb}
    # Only the first rank draws.
    settings |= {"picture_every": trainer.ranks.agree(0 if picture is None else picture_every)}
    settings |= {"batch_size": rows}
    run = Run(
        _config(trainer, settings), trainer.ranks, _fingerprints(batches, trainer.ranks), trainer.device
    )
    if run.finished():
        return _restore(run, trainer)
    course.check_execution(run, trainer.execution)

    def batch(iteration: int) -> Any:
        data, *labels = _parts(source(iteration), trainer)
        return (data, labels[0]) if labels else data

    try:
        with run:
            run.phase(trainer.stream, trainer, trainer.iterations, batch, picture)
            return _finish(run, trainer)
    except Stopped:
        if trainer.ranks.first:
            call = "the same call" if resume == "auto" else "this call with resume='auto'"
            note(f"stopped at iteration {trainer.iteration}; {call} resumes from {run.directory}")
        raise


def shuffled(
    data: Tensor,
    batch_size: int,
    *,
    labels: Tensor | None = None,
    seed: int = 0,
    ranks: Ranks | None = None,
) -> Shuffled:
    """Batches of data in memory, in a new random order in every epoch; a batch may span two epochs.

    Args:
        data: [N, *].
        batch_size: global batch size; the number of ranks must divide it.
        labels: [N], or None.
        seed: seed of the orders. A batch depends on (seed, iteration) alone.
        ranks: ranks that share the rows of a batch; each gets its own rows.

    Returns:
        iteration -> this rank's rows, [batch_size / ranks, *], with their labels if there are any.

    Raises:
        TypeError: ``data`` or ``labels`` is not a tensor, or the batch size not an integer.
        ConfigError: ``data`` is empty or not finite, ``labels`` has another length, or the batch size is not
            a positive multiple of the number of ranks.
    """
    of_type("data", data, Tensor, "a tensor")
    of_type("labels", labels, (Tensor, type(None)), "a tensor or None")
    if not data.ndim or not len(data):
        raise ConfigError(f"data must have shape [N, *], N >= 1, got {[*data.shape]}")
    n = len(data)
    if len(places := data.isfinite().logical_not().nonzero()):
        first = places[0].tolist()
        raise ConfigError(f"data must be finite, got {data[tuple(first)].item()} in row {first[0]}")
    if labels is not None and labels.shape != (n,):
        raise ConfigError(f"labels must have shape [{n}], got {[*labels.shape]}")
    try:
        at_least("batch_size", batch_size, 1)
        count, offset = (ranks or Ranks()).rows(batch_size)
    except ValueError as error:
        raise ConfigError(str(error)) from error

    return Shuffled(data.detach(), labels, batch_size, count, offset, seed)


@dataclasses.dataclass(frozen=True, eq=False)
class Shuffled:
    """What `shuffled` returns: iteration -> this rank's rows, with their labels if there are any."""

    data: Tensor
    labels: Tensor | None
    batch_size: int
    count: int
    """Number of this rank's rows of a batch."""
    offset: int
    """The first of them."""
    seed: int

    def __call__(self, iteration: int) -> Data:
        n, labels, start = len(self.data), self.labels, iteration * self.batch_size + self.offset
        places = numpy.arange(start, start + self.count)
        epochs = range(start // n, (start + self.count - 1) // n + 1)
        rows = numpy.concatenate([_order(n, self.seed, e)[places[places // n == e] % n] for e in epochs])
        chosen = torch.from_numpy(rows).to(self.data.device)
        return self.data[chosen] if labels is None else (self.data[chosen], labels[chosen.to(labels.device)])

    def fingerprint(self) -> str:
        """A digest of the data and labels: their shapes, dtypes and content."""
        parts = [part.detach().cpu() for part in (self.data, self.labels) if part is not None]
        about = [f"{part.dtype} {[*part.shape]}" for part in parts]
        contents = (part.flatten().contiguous().view(torch.uint8).numpy() for part in parts)
        return identity.fingerprint(about, *contents)


def save(path: str | os.PathLike[str], networks: nn.Module, **about: Any) -> None:
    """Saves a module's weights and buffers as a folder with model.safetensors and config.json.

    The folder is written atomically, and equal weights give equal bytes.

    Args:
        path: a new folder, an empty one, or one with saved networks, which are replaced.
        networks: e.g. a trainer's ``averaged``; any module.
        about: entries of config.json, which have to be serializable as json.

    Raises:
        TypeError: an argument is of another type, or the module has extra state that is not a tensor, or
            sharded weights.
        FolderError: the path is a file, or a folder with other content.
    """
    _check(path, networks)
    try:
        json.dumps(about)
    except (TypeError, ValueError) as error:  # ValueError: it contains itself
        raise TypeError(f"about must be serializable as json, got {about}: {error}") from error
    folder = Path(path)
    message = f"path must be a new folder, an empty one or one of saved networks, got {str(folder)!r}"
    if folder.exists() and not folder.is_dir():
        raise folders.FolderError(f"{message}, which is a file")
    others = folders.content(folder) if folder.is_dir() else []
    if others := [name for name in others if not files.named(Path(name), folders.MODEL)]:
        raise folders.FolderError(f"{message}, which holds {first_few(others)}")
    if checkpoint.is_model_of_others(folder):
        raise folders.FolderError(f"{message}, which holds a model that another library saved")
    checkpoint.save_model(folder, networks, about)


def load(path: str | os.PathLike[str], networks: M) -> M:
    """Loads what `save` or `fit` saved into networks of the same architecture, in place.

    Args:
        path: the folder given to `save`, or the ``output`` of a finished `fit`.
        networks: networks to fill, on any device.

    Returns:
        The same networks.

    Raises:
        TypeError: an argument is of another type.
        CheckpointError: the folder has no saved networks, they are damaged, or names or shapes of their
            tensors differ from those of ``networks``, or a sampler has another schedule; the networks are
            then unchanged.
    """
    _check(path, networks)
    folder = Path(path)
    if not folder.is_dir():
        raise checkpoint.CheckpointError(f"path must be a folder of saved networks, got {str(folder)!r}")
    if folders.is_marked(folder):
        folder = folder / "model"
    tensors, _ = checkpoint.load_model_state(folder)
    wanted = networks.state_dict()
    faults = []
    if missing := [name for name in wanted if name not in tensors]:
        faults.append(f"it lacks {first_few(missing)}")
    if unexpected := [name for name in tensors if name not in wanted]:
        faults.append(f"it has {first_few(unexpected)}, which the networks lack")
    shapes = [
        f"{name} has shape {[*tensors[name].shape]}, that of the networks {[*wanted[name].shape]}"
        for name in wanted
        if name in tensors and tensors[name].shape != wanted[name].shape
    ]
    if faults := faults + shapes[:_SHOWN]:
        raise checkpoint.CheckpointError(f"{folder} does not fit the networks: {'; '.join(faults)}")
    before = {name: tensor.detach().clone() for name, tensor in wanted.items()}
    try:
        networks.load_state_dict(tensors)
    except ValueError as error:  # a sampler of another schedule
        networks.load_state_dict(before)
        raise checkpoint.CheckpointError(f"{folder} does not fit the networks: {error}") from error
    return networks


def _reader(batches: Callable[[int], Data] | Iterable[Data]) -> tuple[Data, Callable[[int], Data]]:
    """The first batch, and a function of the iteration that returns all of them."""
    if callable(batches):
        return batches(0), batches
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ConfigError(
            "batches must be a function of the iteration, such as shuffled(data, batch_size), or an iterable "
            f"of batches, got {type(batches).__name__}"
        )
    stream = _repeated(batches)
    first = next(stream)
    all_of_them = itertools.chain([first], stream)
    return first, lambda _: next(all_of_them)


def _check_rows(batches: Shuffled, ranks: Ranks) -> None:
    if (batches.count, batches.offset) != ranks.rows(batches.batch_size):
        raise ConfigError(
            "batches must be shuffled(..., ranks=) with the trainer's ranks, got rows "
            f"{batches.offset} to {batches.offset + batches.count - 1} of each batch on rank {ranks.rank} of "
            f"{ranks.world_size}"
        )


def _fingerprints(batches: Any, ranks: Ranks) -> identity.Fingerprints | None:
    """The fingerprints of the data, on the first rank; None if the batches have none."""
    if not hasattr(batches, "fingerprint"):
        return None
    return {"train": batches.fingerprint()} if ranks.first else {}


def _repeated(batches: Iterable[Data]) -> Iterator[Data]:
    total = 0
    while True:
        before = total
        for batch in batches:
            total += 1
            yield batch
        if total == before:
            raise ConfigError(
                "batches must yield batches each time they are iterated, or enough for all iterations, got "
                f"{total} in total"
            )


def _parts(batch: Data, trainer: Stepper) -> list[Tensor]:
    """Data, and labels if there are any, on the trainer's device.

    Raises:
        ConfigError: they do not fit the trainer.
    """
    return [part for part in trainer.checked(batch) if part is not None]


def _config(trainer: Stepper, run: dict[str, Any]) -> _FitConfig:
    """The settings of a run, which come from the arguments of `fit` and from the trainer.

    Raises:
        ConfigError: a setting is invalid, or the folder holds a run of another trainer.
    """
    run |= {"recipe": trainer.stream, "iterations": int(trainer.iterations), "device": str(trainer.device)}
    run |= {"pretrained": False, "shard": trainer.ranks.shard}
    groups: dict[str, Any] = {"run": RunSettings.of({"task": PYTHON, **run}, run)}
    groups |= {"execution": trainer.execution}
    path = Path(run["output"]) / "config.yaml"
    earlier = config.peek(path, "recipe") if path.is_file() and run["resume"] != "never" else None
    if earlier not in (None, trainer.stream):
        raise ConfigError(
            f"output must be a new folder or that of a run of {trainer.stream!r}, got {run['output']!r}, "
            f"which holds a run of {earlier!r}"
        )
    if isinstance(trainer, DxMITrainer):
        return _FitDxMIConfig(**groups, algorithm=trainer.algorithm, langevin=trainer.langevin)
    # Runs of earlier versions have no settings of a pretrainer to compare with.
    if isinstance(trainer, Pretrainer) and (earlier is None or config.peek(path, "lr") is not None):
        return _FitPretrainerConfig(**groups, pretraining=trainer.settings)
    return _FitConfig(**groups)


def _restore(run: Run, trainer: Stepper) -> dict[str, Any]:
    """Loads the final state of a finished run."""
    found = checkpoint.load_latest(run.checkpoints, note, ranks=run.ranks, lazy=run.ranks.shard)
    if found is None:
        raise checkpoint.CheckpointError(
            f"{run.directory} holds a finished run without checkpoints, from which its trainer cannot be "
            "restored; load its networks with dxmi_ext.load, or train again with resume='never'"
        )
    path, state = found
    try:
        trainer.load_state_dict(state["stepper"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{path} does not fit the trainer: {error}") from error
    return identity.summary_of(run.directory) if run.ranks.first else {}


def _finish(run: Run, trainer: Stepper) -> dict[str, Any]:
    """Saves the averaged networks and the summary, on the first rank."""
    averaged = getattr(trainer, "averaged", None)
    networks = None if averaged is None else run.ranks.whole(averaged)
    if not run.ranks.first:
        return {}
    if networks is not None:
        checkpoint.save_model(run.directory / "model", networks, {"task": PYTHON, "trainer": trainer.stream})
    last = read_metrics(run.log.path)[-1:] or [{}]
    left_out = ("phase", "iteration", *TIMING_FIELDS)
    return run.summarize({"metrics": {k: v for k, v in last[0].items() if k not in left_out}})


@functools.lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> numpy.ndarray:
    """The order of an epoch, int64 [n], from Philox's raw output, which no version of numpy changes."""
    digest = hashlib.blake2b(f"{seed}/shuffled/{epoch}".encode(), digest_size=16).digest()
    words = numpy.random.Philox(key=numpy.frombuffer(digest, "<u8")).random_raw(n)
    return numpy.argsort(words, kind="stable")


def _check(path: Any, networks: Any) -> None:
    of_type("path", path, (str, os.PathLike), "a str or PathLike")
    of_type("networks", networks, nn.Module, "a torch.nn.Module")
    if any(map(sharding.is_sharded, networks.parameters())):
        raise TypeError("networks must be whole, got sharded weights; Ranks.whole gathers them on a rank")
