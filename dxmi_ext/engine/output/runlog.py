"""Logging of a run: metrics.jsonl, pictures, a progress bar; optionally tensorboard and wandb.

Imports tqdm, the standard library and the modules errors, files, folders and sinks of the engine.
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from tqdm import tqdm

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output.sinks import Place, Sink, TensorBoard, WeightsAndBiases
from dxmi_ext.engine.storage import files, folders

TIMING_FIELDS = ("iterations_per_second", "samples_per_second", "peak_memory_mib")
"""Fields of metrics.jsonl that depend on the machine; all others are the same after an interruption."""

Metric = float | Sequence[float]
"""A number, or a list of one for each step of the sampler."""

Item = TypeVar("Item")

_SECONDS_BETWEEN_LINES = 5.0


class RunLog:
    """The log of one run; a context manager.

    Args:
        directory: the run's folder, created if missing.
        enabled: whether to write and show anything; false on all ranks but 0.
        tensorboard: whether to log to DIR/tb/ too; a note says if tensorboard is not installed.
        wandb: project of Weights & Biases to log to as well.
        config: the run's settings, for Weights & Biases.

    Raises:
        UserError: wandb is set but not installed.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        enabled: bool = True,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.path = self.directory / "metrics.jsonl"
        self.enabled = enabled
        self.pictures = self.directory / "pictures"
        self._sinks: list[Sink] = []
        if enabled and tensorboard:
            try:
                self._sinks.append(TensorBoard(self.directory))
            except UserError as error:  # on by default, so its absence is not an error
                self.note(f"tb/ stays empty: {error}")
        if enabled and wandb:
            self._sinks.append(WeightsAndBiases(self.directory, wandb, config or {}))
        self._file: io.FileIO | None = None
        self._place = Place("", 0, 0)  # last logged
        self._draws = True

    def __enter__(self) -> RunLog:
        if self.enabled:
            self.directory.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a failed write is not repeated on closing.
            self._file = self.path.open("ab", buffering=0)
            for sink in self._sinks:
                sink.open()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
            for sink in self._sinks:
                sink.close(failed=exception[0] is not None)

    def log(
        self, phase: str, iteration: int, metrics: Mapping[str, Metric], symptoms: Sequence[str] = ()
    ) -> None:
        """Append one line; numbers that are not finite become null.

        Args:
            symptoms: names of problems, logged if there are any.
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
        self._tell(row)

    def picture(self, phase: str, iteration: int, draw: Callable[[IO[bytes]], None]) -> None:
        """Save a picture of an iteration just logged as DIR/pictures/PHASE_ITERATION.png.

        Args:
            phase, iteration: as logged.
            draw: writes the png. Without matplotlib, a note says so and no picture is drawn.
        """
        if self._file is None or not self._draws:
            return
        png = io.BytesIO()
        try:
            draw(png)
        except ModuleNotFoundError as error:
            self._draws = False
            self.note(f"no pictures, since {error.name} is not installed: pip install {error.name}")
            return
        self.pictures.mkdir(exist_ok=True)
        files.write_bytes(self._picture_of(phase, iteration), png.getvalue())
        for sink in self._sinks:
            sink.picture(self._place, png.getvalue())

    def progress(self, phase: str, total: int, start: int = 0) -> Progress:
        """Progress bar of a phase from iteration ``start`` to ``total``; lines without a terminal."""
        return Progress(phase, total, start, enabled=self.enabled)

    def position(self) -> int:
        """Size of metrics.jsonl after a flush to disk, which a checkpoint keeps for ``truncate``."""
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
            self.note(f"metrics.jsonl has lost lines: expected {position} bytes, got {size}")
        self._place, last = Place("", 0, 0), -1
        for row in read_metrics(self.path):
            self._place = self._advance(row)
            last = self._place.total
        self._file.truncate(min(size, position))
        self._file.seek(0, os.SEEK_END)
        for sink in self._sinks:
            sink.rewind(last)
        self._place, drawn = Place("", 0, 0), set()
        for row in read_metrics(self.path):
            self._tell(row)
            picture = self._picture_of(row["phase"], row["iteration"])
            if picture.is_file():
                drawn.add(picture)
                for sink in self._sinks:
                    sink.picture(self._place, picture.read_bytes())
        if self.pictures.is_dir():
            for picture in self.pictures.iterdir():
                if picture not in drawn and files.named(picture, folders.PICTURES):
                    picture.unlink()

    def _tell(self, row: Mapping[str, Any]) -> None:
        """Passes a row of metrics.jsonl to the sinks, with vectors as scalars."""
        self._place = self._advance(row)
        values: dict[str, float | None] = {}
        for name, value in row.items():
            if isinstance(value, list):
                values |= {f"{row['phase']}/{name}/{t}": number for t, number in enumerate(value)}
            elif name not in ("phase", "iteration"):
                values[f"{row['phase']}/{name}"] = value
        values = {name: value for name, value in values.items() if not isinstance(value, str)}  # symptoms
        for sink in self._sinks:
            sink.scalars(self._place, {k: math.nan if v is None else v for k, v in values.items()})

    def _advance(self, row: Mapping[str, Any]) -> Place:
        """The place of a row, given the place of the previous one; the last of a phase is always logged."""
        phase, iteration, last = row["phase"], row["iteration"], self._place
        past = last.total - last.iteration if phase == last.phase else last.total
        return Place(phase, iteration, past + iteration)

    def _picture_of(self, phase: str, iteration: int) -> Path:
        return self.pictures / f"{phase}_{iteration:08d}.png"

    def note(self, text: str) -> None:
        """Print one line on stderr without breaking the progress bar."""
        if self.enabled:
            note(text)


def note(text: str) -> None:
    """Print one line on stderr without breaking a progress bar."""
    tqdm.write(text, file=sys.stderr)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, which may still be written or end in an incomplete line. Invalid lines are
    skipped."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if (
        not isinstance(row, dict)
        or not isinstance(row.get("phase"), str)
        or type(row.get("iteration")) is not int
    ):
        return None
    metrics = (value for name, value in row.items() if name not in ("phase", "symptoms"))
    return row if all(map(_is_metric, metrics)) else None


def _is_metric(value: Any) -> bool:
    numbers = value if isinstance(value, list) else [value]
    return all(number is None or type(number) in (int, float) for number in numbers)


class Progress:
    """A progress bar as a context manager; made by ``RunLog.progress``."""

    def __init__(self, phase: str, total: int, start: int, *, enabled: bool) -> None:
        bar = tqdm if sys.stderr.isatty() else _Lines
        self._bar = bar(total=total, initial=start, desc=phase, disable=not enabled, dynamic_ncols=True)

    def update(self, n: int = 1, **postfix: float) -> None:
        """Advance by ``n`` iterations; ``postfix``, such as losses, is shown until the next update."""
        if postfix:
            self._bar.set_postfix(postfix, refresh=False)
        self._bar.update(n)

    def back_to(self, iteration: int) -> None:
        """Shows an earlier iteration, after a rollback."""
        self._bar.update(iteration - self._bar.n)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.refresh()
        self._bar.close()


def each(phase: str, items: Collection[Item]) -> Iterator[Item]:
    """The items, one by one, under a progress bar; for items that take seconds or minutes each."""
    with Progress(phase, len(items), 0, enabled=True) as bar:
        for item in items:
            yield item
            bar.update()


class _Lines(tqdm):
    """tqdm for logs: a new line every few seconds."""

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
        """Nothing to clear: lines stay."""


def write_json(path: Path | str, obj: Any) -> None:
    """Write json atomically."""
    files.write_text(path, json.dumps(obj, indent=2) + "\n")


def _numbers(value: Metric) -> Any:
    if isinstance(value, Sequence):
        return [_numbers(number) for number in value]
    return float(value) if math.isfinite(value) else None
