"""One run in its folder: phases of iterations, logged, checkpointed, stopped and resumed exactly.

Imports torch and ``dxmi_ext``; knows nothing of what the phases train.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy
import torch
from torch import Tensor, nn

from dxmi_ext import __version__, checkpoint, config, files, folders, health
from dxmi_ext.errors import UserError
from dxmi_ext.ranks import Ranks, Votes
from dxmi_ext.runlog import RunLog, write_json
from dxmi_ext.signals import StopSignals
from dxmi_ext.trainer import Stepper

# Settings that may change when a run goes on; all others belong to what it is.
_MAY_CHANGE = {"output", "iterations", "device", "threads", "shard", "resume", "tensorboard", "wandb"}
_MAY_CHANGE |= {"checkpoint_every", "keep_checkpoints", "log_every", "picture_every", "dry_run", "cache"}
# Settings that may be paths: config.yaml has them whole, so that a run is read from any current folder.
_PATHS = ("start", "weights", "cache", "features")
_KEYS_OF_A_SUMMARY = {"iterations": int, "device": str, "wall_seconds": float, "resumed_from": list}
_KEYS_OF_A_SUMMARY |= {"versions": dict}

C = TypeVar("C", bound=config.RunConfig)
Fingerprints = dict[str, str]
"""What the data of a run are, wherever they lie: of each split one."""


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that a setting names; of several processes on a machine, each takes one of its own.

    Raises:
        config.ConfigError: a CUDA device is wanted and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise config.ConfigError(f"device: got {name!r}, but torch sees no CUDA device; use device=cpu")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise config.ConfigError(f"device must be cuda:N with N < {torch.cuda.device_count()}, got {name!r}")
    return torch.device(name, local_rank) if name == "cuda" and local_rank else torch.device(name)


def versions() -> dict[str, str]:
    """Of what a result depends on."""
    return {
        "dxmi_ext": __version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
    }


def fingerprint(*parts: Any) -> str:
    """Says whether arrays, texts and lists of texts are the same, in their order."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, numpy.ndarray):
            digest.update(f"{part.dtype} {part.shape} ".encode())
            digest.update(numpy.ascontiguousarray(part).data)
        else:
            digest.update(f"{part!r} ".encode())
    return digest.hexdigest()


def settings_of(cls: type[C], directory: Path) -> C:
    """The settings in a run's config.yaml.

    Raises:
        config.ConfigError: names the file and what is wrong with it.
    """
    path = directory / "config.yaml"
    try:
        return config.load(cls, path)
    except config.ConfigError as error:
        if str(error).startswith(str(path)):
            raise
        raise config.ConfigError(f"{path}: {error}") from error


def summary_of(directory: Path) -> dict[str, Any]:
    """What a run's summary.json says; empty where there is none, or none that a run wrote."""
    found = files.read_json(directory / "summary.json")
    whole = all(isinstance(found.get(key), kind) for key, kind in _KEYS_OF_A_SUMMARY.items())
    return found if whole else {}


def data_of(directory: Path) -> Fingerprints:
    """The fingerprints of the data that a run was trained on; empty where it does not know them."""
    found = folders.read(directory).get("data")
    return dict(found) if isinstance(found, dict) else {}


def changed(known: Fingerprints, found: Fingerprints) -> list[str]:
    """The splits that both know, and of which the data are others."""
    return [split for split in found if known.get(split, found[split]) != found[split]]


class Run:
    """A run in ``cfg.output``; a context manager, and the only writer of that folder. Of several ranks, the
    first writes and all of them read.

    Args:
        cfg: its settings; an output is filled in where there is none. ``cfg.resume``: ``auto`` goes on from
            the folder's last whole checkpoint if there is one, ``never`` empties the folder of an earlier run
            first, a path goes on from that checkpoint. ``cfg.dry_run``: one iteration of each phase, nothing
            written.
        ranks: of the run; their process group stands.
        data: where `cfg.data` is a path: the fingerprints of the data at a path, by which a run knows its
            data again wherever they lie.

    Raises:
        folders.FolderError: the folder is not that of a run.
        config.ConfigError: it holds a run of other settings or data, or the ranks do not divide the batch.
        files.Locked: another process runs in the folder.
        checkpoint.CheckpointError: the checkpoint to resume from is missing or damaged.
        health.Diverged: steps stay not finite, however often the run goes back to a checkpoint.
        signals.Stopped: on SIGTERM or Ctrl-C; in a phase, once the iteration under way is done and saved.
    """

    def __init__(
        self,
        cfg: config.RunConfig,
        ranks: Ranks | None = None,
        data: Callable[[str], Fingerprints] | None = None,
    ) -> None:
        self.cfg, self.ranks = cfg, dataclasses.replace(ranks or Ranks(), shard=cfg.shard)
        try:
            self.rows = self.ranks.rows(cfg.batch_size)  # how many of a batch are this rank's, and the first
        except ValueError as error:
            raise config.ConfigError(str(error)) from error
        self._data = data
        _make_paths_whole(cfg, *_PATHS, *["data"] * (data is not None))
        # Names of folders that nobody else has, where none is given.
        self._names = None if cfg.output else _new_names(f"runs/{cfg.recipe.replace('/', '-')}")
        self.device = choose_device(cfg.device, self.ranks.local_rank)
        self._place(cfg.output or next(self._names or iter(())))
        self.signals, self._votes = StopSignals(), Votes(self.ranks)
        self.resumed_from: list[int] = []
        self.past: list[str] = []  # phases that are over
        self._steps_past = 0  # their iterations
        self.rollbacks: list[dict[str, Any]] = []
        self._good = 0  # step of the checkpoint to go back to
        self._symptoms: set[str] = set()  # at the last log
        self._state: dict[str, Any] | None = None  # to resume from, until its phase has taken it
        self._earlier_seconds = 0.0
        self._started = time.monotonic()
        self._on_first(self._check)

    def _place(self, output: str) -> None:
        """Takes a folder as that of the run."""
        cfg = self.cfg
        cfg.output = str(self.ranks.agree(output))
        self.directory = Path(cfg.output)
        self.log = RunLog(
            self.directory,
            enabled=self.ranks.first and not cfg.dry_run,
            tensorboard=cfg.tensorboard,
            wandb=cfg.wandb,
            config=dataclasses.asdict(cfg),
        )

    def _on_first(self, action: Callable[[], None]) -> None:
        """Does something on the first rank; all wait for it, and fail as it does."""
        failure: BaseException | None = None
        if self.ranks.first:
            try:
                action()
            except (UserError, OSError) as error:
                failure = error
        told = self.ranks.agree(None if failure is None else str(failure))
        if failure is not None:
            raise failure
        if told is not None:
            raise config.ConfigError(told)

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def wall_seconds(self) -> float:
        """Spent on this run, in all its sessions."""
        return self._earlier_seconds + time.monotonic() - self._started

    def finished(self) -> bool:
        """Whether the folder holds this run already, finished; it is told then."""
        done = False
        if not self.cfg.dry_run and self.cfg.resume == "auto":
            done = summary_of(self.directory).get("iterations", -1) >= self.cfg.iterations
        done = self.ranks.agree(done)
        if done and not self.ranks.agree(self._data is None or self._was_there()):
            self._check_data()
        if done and self.ranks.first:
            print(f"{self.directory} holds this run already, finished; nothing to do")
        return bool(done)

    def __enter__(self) -> Run:
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            if self.cfg.threads:
                torch.set_num_threads(self.cfg.threads)
            if self.cfg.dry_run and self.ranks.first:
                print(config.to_yaml(dataclasses.replace(self.cfg, dry_run=False)))
            if not self.cfg.dry_run:
                stack.enter_context(self.signals)
                self._open(stack)
            self._exit = stack.pop_all().__exit__
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit(*exception)

    def _open(self, stack: ExitStack) -> None:
        """Makes the folder that of a run at the iteration it starts from. A death at any place in here leaves
        one that the next start makes the same of."""
        self._on_first(self._make_folder)
        if self._names is not None:
            self._place(str(self.directory))
        self._on_first(lambda: self._lock(stack))
        about = {} if self._data is None else {"data": self._check_data()}
        self._on_first(lambda: self._prepare(about))  # nobody reads before this is done
        found = self._load()
        self.ranks.agree(None)  # nobody writes before all have read
        stack.enter_context(self.log)
        if found is not None:
            self._state = found[1]
            self._earlier_seconds = self._state["wall_seconds"]
            self.resumed_from = [*self._state["resumed_from"], self._state["step"]]
            self.past, self._steps_past = self._state["past"], self._state["steps_past"]
            self._good = self._state["step"]
            if self._mine(found[0]):
                self.rollbacks, self._good = self._state["rollbacks"], self._state["good"]
        if self.ranks.first:
            self._take_over(found)

    def _make_folder(self) -> None:
        """If its name is not given, none that another run has taken since."""
        while self._names is not None:
            try:
                self.directory.mkdir(parents=True)
                return
            except FileExistsError:
                self.directory = Path(next(self._names))
        self.directory.mkdir(parents=True, exist_ok=True)

    def _lock(self, stack: ExitStack) -> None:
        """Keeps all others out from now on; a folder that stays empty vanishes again."""

        def leave() -> None:
            with suppress(OSError):
                self.directory.rmdir()

        stack.callback(leave)
        stack.enter_context(files.lock(self.directory / ".lock"))
        self._check()  # again, for another process may have been here

    def _prepare(self, about: dict[str, Any]) -> None:
        folders.mark(self.directory, "run", **about)
        if self.cfg.resume == "never":
            folders.clear(self.directory)
        for folder, ours in (
            (self.directory, folders.RUN),
            (self.checkpoints, folders.CHECKPOINTS),
            (self.log.pictures, folders.PICTURES),
        ):
            files.tidy(folder, ours)

    def _take_over(self, found: tuple[Path, Any] | None) -> None:
        """Makes the folder agree with the checkpoint that the run goes on from."""
        config.save(self.cfg, self.directory / "config.yaml")
        for name in ("summary.json", "failure.json"):  # a run that goes on is not finished
            (self.directory / name).unlink(missing_ok=True)
        if found is None:
            self.log.truncate(0)
            return
        source, state = found
        self.log.note(f"resuming from {source}")
        # Later checkpoints go before the lines they count on do.
        wanted = state["log_position"] if self._mine(source) else 0  # another folder's lines are not here
        position = min(wanted, self.log.position())
        if self._mine(source) and position == wanted:
            keep = self.cfg.keep_checkpoints
            checkpoint.prune(self.checkpoints, state["step"], keep=keep, spare=self._good)
        else:  # another folder's, or the log has lost lines
            changes = {"rollbacks": self.rollbacks, "good": self._good, "log_position": position}
            self._adopt(source, state["step"], changes)
        self.log.truncate(wanted)

    def _mine(self, source: Path) -> bool:
        """Whether a checkpoint lies in this run's folder."""
        return source.resolve().parent == self.checkpoints.resolve()

    def _load(self) -> tuple[Path, Any] | None:
        """The checkpoint to resume from, and where it lies."""
        if self.cfg.resume == "never":
            return None
        if self.cfg.resume == "auto":
            return self._load_latest()
        path = Path(self.cfg.resume)
        return path, checkpoint.load(path, ranks=self.ranks, lazy=self.ranks.shard)

    def _load_latest(self, until: int | None = None) -> tuple[Path, Any] | None:
        # Where weights are sharded no rank needs the whole.
        return checkpoint.load_latest(
            self.checkpoints, self.log.note, until=until, ranks=self.ranks, lazy=self.ranks.shard
        )

    def describe(self, networks: nn.Module) -> None:
        """Tells the size of each network, if this is a dry run."""
        if self.cfg.dry_run and self.ranks.first:
            for name, network in networks.named_children():
                print(f"{name}: {sum(p.numel() for p in network.parameters()):,} parameters")

    def phase(
        self,
        name: str,
        stepper: Stepper,
        iterations: int,
        batch: Callable[[int], Tensor],
        picture: Callable[[IO[bytes]], None] | None = None,
    ) -> None:
        """Runs a phase to its last iteration, from where a resumed run stood; not at all if it was past.
        A dry run tries its first iteration.

        Args:
            name: of the phase.
            stepper: what it repeats.
            iterations: its length.
            batch: iteration -> this rank's rows of the data.
            picture: draws the samples of fixed noise, as a png, every `picture_every` iterations; it changes
                nothing and is called on the first rank alone.
        """
        if self.cfg.dry_run:
            self._try(name, stepper, iterations, batch)
            return
        if name in self.past:
            return
        resumed = self._resume(name, stepper)
        with self.log.progress(name, iterations, stepper.iteration) as bar, self.signals.held():
            if not resumed:
                self._save(name, stepper)  # something to go back to
            clock = _Clock(self.device, self.cfg.batch_size, stepper.iteration)
            while stepper.iteration < iterations:
                metrics = stepper.step(batch(stepper.iteration))
                now, last = stepper.iteration, stepper.iteration == iterations
                losses, saved = {}, False
                draws = picture if _due(self.cfg.picture_every, now) else None
                logs = last or _due(self.cfg.log_every, now) or draws is not None
                saves = last or _due(self.cfg.checkpoint_every, now)
                stops = self._stops(now)
                if logs or saves or stops:
                    numbers = _to_host(metrics)
                    failures = max(health.failures(numbers).values(), default=0)
                    # Not because of a signal: the run would differ from an uninterrupted one.
                    if (logs or saves) and 0 < self.cfg.rollback_after <= failures:
                        self._roll_back(name, stepper, numbers)
                        bar.back_to(stepper.iteration)
                        clock = _Clock(self.device, self.cfg.batch_size, stepper.iteration)
                        continue
                    if logs:
                        self._log(name, stepper, numbers | clock.lap(now))
                        losses = _losses(numbers)
                    if draws is not None:
                        self.log.picture(name, now, draws)
                    saved = last or ((saves or stops) and not failures)
                    if saved:
                        self._save(name, stepper, good=saves)
                bar.update(1, **losses)
                if stops or (saved and self._stops(now)):  # perhaps asked to within the save
                    break
        self.past.append(name)
        self._steps_past += iterations

    def _resume(self, phase: str, stepper: Stepper) -> bool:
        """Takes over the state to resume from, if it is of this phase."""
        if self._state is None or self._state["phase"] != phase:
            return False
        try:
            stepper.load_state_dict(self._state["stepper"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise checkpoint.CheckpointError(f"the checkpoint is of other settings: {error}") from error
        self._state = None
        self._retry(phase, stepper)
        return True

    def _retry(self, phase: str, stepper: Stepper) -> None:
        attempt = sum(rollback["phase"] == phase for rollback in self.rollbacks)
        stepper.retry(attempt, self.cfg.rollback_lr**attempt)

    def _log(self, phase: str, stepper: Stepper, numbers: dict[str, Any]) -> None:
        """Logs an iteration; a symptom is noted when it comes and when it goes."""
        symptoms = stepper.symptoms(numbers)
        for name in symptoms.keys() - self._symptoms:
            self.log.note(f"{phase} {stepper.iteration}: {name}: {symptoms[name]}")
        for name in self._symptoms - symptoms.keys():
            self.log.note(f"{phase} {stepper.iteration}: no more {name}")
        self._symptoms = set(symptoms)
        self.log.log(phase, stepper.iteration, numbers, symptoms=sorted(symptoms))

    def _roll_back(self, phase: str, stepper: Stepper, numbers: dict[str, Any]) -> None:
        """Goes back to the last checkpoint, which is of a good state, with other noise and lower rates.

        Raises:
            health.Diverged: it has done so as often as it may.
        """
        failures, at = health.failures(numbers), f"{phase} {stepper.iteration}"
        steps = ", ".join(f"{count} of the {name}" for name, count in failures.items())
        what = f"{at}: steps in a row that were not finite: {steps}"
        rollback = {"phase": phase, "iteration": stepper.iteration, "failures": failures}
        self.rollbacks = [*self.rollbacks, rollback | {"symptoms": stepper.symptoms(numbers)}]
        found = self._load_latest(until=self._good)
        self.ranks.agree(None)  # nobody writes before all have read
        if found is None or found[1]["phase"] != phase:  # deleted or damaged under the run
            raise checkpoint.CheckpointError(f"{what}, and {self.checkpoints} has no checkpoint of {phase}")
        source, state = found
        if len(self.rollbacks) > self.cfg.rollbacks:
            if self.ranks.first:
                report = {"last_checkpoint": str(source), "rollbacks": self.rollbacks}
                write_json(self.directory / "failure.json", report)
            raise health.Diverged(
                f"{what}, after going back {self.cfg.rollbacks} times; failure.json tells more. {source} is "
                f"good: resume={source} with another output goes on from it, with lower rates, clipped "
                "gradients or a larger gamma perhaps"
            )
        stepper.load_state_dict(state["stepper"])
        self._retry(phase, stepper)
        self.log.note(f"{what}; going back to {source} with other noise and rates x {self.cfg.rollback_lr}")
        if self.ranks.first:
            # Or a resume would meet the same again.
            self._adopt(source, state["step"], {"rollbacks": self.rollbacks})
            self.log.truncate(state["log_position"])
        self.ranks.agree(None)

    def _stops(self, iteration: int, *, wait: bool = False) -> bool:
        """Whether a signal has come, to any rank. All hear of it after the same iteration: the next, unless
        they wait."""
        if self._votes.ask(iteration, self.signals.pending, wait=wait):
            self.signals.ask()
            return True
        return False

    def _try(self, name: str, stepper: Stepper, iterations: int, batch: Callable[[int], Tensor]) -> None:
        if iterations == 0:
            print(f"{name}: no iterations")
            return
        losses = _losses(_to_host(stepper.step(batch(0))))
        if not self.ranks.first:
            return
        shown = ", ".join(f"{key} {value}" for key, value in losses.items())
        print(
            f"{name}: one iteration, {shown}; weights, optimizer and averages (a checkpoint) take "
            f"{checkpoint.nbytes(stepper.state_dict()) / 2**20:.1f} MiB, {_peak_memory(self.device)}"
        )

    def _save(self, phase: str, stepper: Stepper, *, good: bool = True) -> None:
        """Saves a checkpoint; one to go back to is not a signal's: the run would differ from another."""
        if good:
            self._good = self._steps_past + stepper.iteration
        state: dict[str, Any] = {
            "phase": phase,
            "past": self.past,
            "steps_past": self._steps_past,
            "step": self._steps_past + stepper.iteration,
            "stepper": stepper.state_dict(),
            "log_position": self.log.position(),
            "resumed_from": self.resumed_from,
            "rollbacks": self.rollbacks,
            "good": self._good,
            "wall_seconds": self.wall_seconds,
        }
        keep = self.cfg.keep_checkpoints
        checkpoint.save(self.checkpoints, state["step"], state, keep=keep, spare=self._good, ranks=self.ranks)
        # Waits for those who write, without a limit of seconds; nothing is under way at a phase's end.
        self._stops(stepper.iteration, wait=True)

    def _adopt(self, source: Path, step: int, changes: dict[str, Any]) -> None:
        keep = self.cfg.keep_checkpoints
        checkpoint.adopt(source, self.checkpoints, step, changes, keep=keep, spare=self._good)

    def summarize(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Writes summary.json, which makes the run a finished one."""
        summary = {
            "recipe": self.cfg.recipe,
            "seed": self.cfg.seed,
            "device": str(self.device),
            "world_size": self.ranks.world_size,
            "batch_size_per_rank": self.rows[0],
            "iterations": self.cfg.iterations,
            "resumed_from": self.resumed_from,
            "rollbacks": self.rollbacks,
            "wall_seconds": round(self.wall_seconds, 1),
            **numbers,
            "versions": versions(),
        }
        write_json(self.directory / "summary.json", summary)
        return summary

    def _check(self) -> None:
        """Refuses a folder that is no run's, or holds a run of other settings."""
        folders.check(self.directory, "run", folders.is_unmarked_run)
        if (earlier := self._earlier()) is None:
            return
        for field in dataclasses.fields(self.cfg):
            if field.name in _MAY_CHANGE or (field.name == "data" and self._data is not None):
                continue
            was, wanted = getattr(earlier, field.name), getattr(self.cfg, field.name)
            if was != wanted and not (field.name in _PATHS and _same_place(was, wanted)):
                raise config.ConfigError(
                    f"{field.name}: got {wanted!r}, but {self.directory} holds a run with {was!r}; choose "
                    "another output, or resume=never to overwrite it"
                )

    def _earlier(self) -> config.RunConfig | None:
        """The settings of the run that the folder holds, whose checkpoints and results belong to them; None
        where there is none to go on with. One without any results (the data were not found, say) is none."""
        kept = (self.directory / "summary.json").is_file()
        kept |= files.holds(self.directory / "model", folders.MODEL)
        kept |= files.holds(self.checkpoints, folders.CHECKPOINTS)
        if self.cfg.resume == "never" or not (self.directory / "config.yaml").is_file() or not kept:
            return None
        return settings_of(type(self.cfg), self.directory)

    def _was_there(self) -> bool:
        """Whether the run that the folder holds has its data where they are now."""
        earlier: Any = self._earlier()
        return earlier is None or _same_place(earlier.data, getattr(self.cfg, "data", None))

    def _check_data(self) -> Fingerprints:
        """What the data are.

        Raises:
            config.ConfigError: the folder holds a run of other data.
        """
        path = getattr(self.cfg, "data", None)
        if self._data is None or path is None:
            return {}
        found = self._data(path)
        self._on_first(lambda: self._compare_data(path, found))
        return found

    def _compare_data(self, path: str, found: Fingerprints) -> None:
        earlier: Any = self._earlier()
        if earlier is None:
            return
        known, way_out = data_of(self.directory), "choose another output, or resume=never to overwrite it"
        if not known and self._was_there():
            return
        if not known and earlier.data is not None and Path(earlier.data).exists():
            assert self._data is not None
            known = self._data(earlier.data)
        if not known:
            raise config.ConfigError(
                f"data: got {path!r}, but {self.directory} holds a run with {earlier.data!r}, which is gone, "
                f"and no fingerprint of it; put the data, or a link to them, there, {way_out}"
            )
        if others := changed(known, found):
            raise config.ConfigError(
                f"data: {path!r} must hold what {self.directory} was trained on ({earlier.data!r}), but its "
                f"{others[0]} split has another fingerprint; {way_out}"
            )


def _make_paths_whole(cfg: config.RunConfig, *names: str) -> None:
    for name in names:
        value = getattr(cfg, name, None)
        if isinstance(value, str) and cfg.changed(name) and os.path.exists(os.path.expanduser(value)):
            setattr(cfg, name, os.path.abspath(os.path.expanduser(value)))


def _same_place(path: str | None, other: str | None) -> bool:
    if path is None or other is None:
        return path == other
    return os.path.realpath(os.path.expanduser(path)) == os.path.realpath(os.path.expanduser(other))


def _new_names(start: str) -> Iterator[str]:
    """Names of folders that are not there yet."""
    start = f"{start}-{time.strftime('%Y%m%d-%H%M%S')}"
    for name in itertools.chain([start], (f"{start}-{i}" for i in itertools.count(2))):
        if not os.path.lexists(name):
            yield name


def _due(every: int, iteration: int) -> bool:
    return every > 0 and iteration % every == 0


class _Clock:
    """Measures the pace of a phase. It never waits for the device: it is asked after the log did.

    Args:
        device: on CUDA, the peak of its memory is told too.
        batch_size: samples an iteration.
        start: the iteration before the first.
    """

    def __init__(self, device: torch.device, batch_size: int, start: int) -> None:
        self._device, self._batch_size = device, batch_size
        self._last, self._since = start, time.perf_counter()

    def lap(self, iteration: int) -> dict[str, float]:
        """``runlog.TIMING_FIELDS`` since the last lap."""
        now = time.perf_counter()
        pace = (iteration - self._last) / (now - self._since)
        self._last, self._since = iteration, now
        numbers = {"iterations_per_second": pace, "samples_per_second": pace * self._batch_size}
        if self._device.type == "cuda":
            numbers["peak_memory_mib"] = torch.cuda.max_memory_allocated(self._device) / 2**20
        return {name: float(f"{number:.4g}") for name, number in numbers.items()}


def _to_host(metrics: dict[str, Tensor]) -> dict[str, Any]:
    """Metrics, scalars and vectors, as numbers and lists, by one transfer from the device."""
    packed = torch.cat([metric.float().flatten() for metric in metrics.values()]).cpu()
    parts = packed.split([metric.numel() for metric in metrics.values()])
    return {
        name: part.tolist() if metric.ndim else part.item()
        for (name, metric), part in zip(metrics.items(), parts, strict=True)
    }


def _losses(numbers: dict[str, Any]) -> dict[str, float]:
    """Those of the numbers that a line has room for."""
    return {key: round(float(numpy.mean(value)), 4) for key, value in numbers.items() if key.endswith("loss")}


def _peak_memory(device: torch.device) -> str:
    if device.type == "cuda":
        return f"at most {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB of {device} so far"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # which Linux counts in KiB
    return f"the process at most {peak:,.0f} MiB so far"
