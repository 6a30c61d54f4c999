"""What a run tells: metrics.jsonl, tensorboard, a progress bar.

Imports tqdm, ``dxmi_ext.files`` and the standard library alone; tensorboard is imported where used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dxmi_ext import files

TIMING_FIELDS = ("iterations_per_second", "samples_per_second", "peak_memory_mib")
"""What metrics.jsonl tells of the machine; all the rest of it is the same after any interruption."""

Metric = float | Sequence[float]
"""A number, or one for each step of the sampler."""

_SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """The log of one run, to be used as a context manager.

    Args:
        directory: the run's folder; made where it does not exist.
        enabled: false on every rank but 0: nothing is written or shown.
        tensorboard: also write DIR/tb/.
    """

    def __init__(self, directory: Path | str, *, enabled: bool = True, tensorboard: bool = False) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self.enabled = enabled
        self._events = (
            _Events(self.directory / "tb") if tensorboard and enabled and _has_tensorboard() else None
        )
        self._file: FileIO | None = None

    def __enter__(self) -> RunLog:
        if self.enabled:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what a full disk refuses is not tried again on closing.
            self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._events is not None:
            self._events.close()

    def log(
        self, phase: str, iteration: int, metrics: Mapping[str, Metric], symptoms: Sequence[str] = ()
    ) -> None:
        """Append one line; a number that is not finite becomes null, for json has none.

        Args:
            symptoms: names of what is wrong with them, told where there are any.
        """
        if self._file is None:
            return
        numbers = {name: _numbers(value) for name, value in metrics.items()}
        row = {"phase": phase, "iteration": iteration, **numbers}
        row |= {"symptoms": list(symptoms)} if symptoms else {}
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        with files.naming(self.path):
            while line:
                line = line[self._file.write(line) :]
        if self._events is not None:
            self._events.write(phase, iteration, numbers)

    def progress(self, phase: str, total: int, start: int = 0) -> Progress:
        """A bar of a phase from iteration ``start`` to ``total``; plain lines where stderr is no terminal."""
        return Progress(phase, total, start, enabled=self.enabled)

    def position(self) -> int:
        """Bytes of metrics.jsonl that are safe on disk: what a checkpoint keeps for ``truncate``."""
        if self._file is None:
            return 0
        with files.naming(self.path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def truncate(self, position: int) -> None:
        """Go back to a checkpoint's position (0: a fresh start), so that every iteration is logged once."""
        if self._file is None:
            return
        size = self._file.tell()
        if size < position:
            self.note(f"metrics.jsonl has lost lines: {size} bytes, the checkpoint knows {position}")
        self._file.truncate(min(size, position))
        self._file.seek(0, os.SEEK_END)
        if self._events is not None:  # its files cannot be cut: write them anew
            self._events.clear()
            for row in read_metrics(self.path):
                row.pop("symptoms", None)
                self._events.write(row.pop("phase"), row.pop("iteration"), row)

    def note(self, text: str) -> None:
        """Say one line on stderr without tearing the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, also of one that is being written or was torn by a kill."""
    path = Path(path)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


class _Events:
    """A tensorboard file, written at once: torch's writer does it in a thread, whose failures go unheard."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._file: FileIO | None = None

    def write(self, phase: str, iteration: int, numbers: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        scalars: dict[str, float | None] = {}
        for name, value in numbers.items():
            if isinstance(value, list):
                scalars |= {f"{phase}/{name}/{t}": number for t, number in enumerate(value)}
            else:
                scalars[f"{phase}/{name}"] = value
        values = [
            Summary.Value(tag=tag, simple_value=math.nan if number is None else number)
            for tag, number in scalars.items()
        ]
        events = [Event(wall_time=time.time(), step=iteration, summary=Summary(value=values))]
        with files.naming(self._directory):
            if self._file is None:
                self._directory.mkdir(exist_ok=True)
                name = f"events.out.tfevents.{time.time_ns()}"
                self._file = (self._directory / name).open("wb", buffering=0)
                events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
            writer = RecordWriter(self._file)
            for event in events:
                writer.write(event.SerializeToString())

    def clear(self) -> None:
        self.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Progress:
    """A progress bar as a context manager; made by ``RunLog.progress``."""

    def __init__(self, phase: str, total: int, start: int, *, enabled: bool) -> None:
        bar = tqdm if sys.stderr.isatty() else _Lines
        self._bar = bar(total=total, initial=start, desc=phase, disable=not enabled, dynamic_ncols=True)

    def update(self, n: int = 1, **postfix: float) -> None:
        """Advance by ``n`` iterations; ``postfix`` (losses, say) is shown until the next one."""
        if postfix:
            self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(n)

    def back_to(self, iteration: int) -> None:
        """Shows an earlier iteration: the run has gone back to it."""
        self._bar.update(iteration - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.refresh()
        self._bar.close()


class _Lines(tqdm):
    """tqdm for logs: a line of its own every few seconds."""

    def __init__(self, **options: Any) -> None:
        layout = "{desc}: {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        super().__init__(
            bar_format=layout,
            mininterval=_SECONDS_BETWEEN_LINES,
            maxinterval=_SECONDS_BETWEEN_LINES,
            leave=False,
            **options,
        )

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # an empty message would clear the bar on closing
            self.fp.write(f"{self}\n")
            self.fp.flush()
        return False

    def clear(self, *args: Any, **kwargs: Any) -> None:
        """Lines stay when a note comes between them."""


def write_json(path: Path | str, obj: Any) -> None:
    """Write json that is complete or absent whenever the process is killed."""
    files.write_text(path, json.dumps(obj, indent=2) + "\n")


def _numbers(value: Metric) -> Any:
    if isinstance(value, Sequence):
        return [_numbers(number) for number in value]
    return float(value) if math.isfinite(value) else None


def _has_tensorboard() -> bool:
    try:
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError:
        print("tensorboard is not installed, so tb/ stays empty: pip install tensorboard", file=sys.stderr)
        return False
    return True
