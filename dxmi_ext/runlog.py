"""What a run tells: metrics.jsonl, tensorboard, a progress bar.

Imports tqdm and the standard library alone; torch's tensorboard is imported where used.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

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
        self.enabled = enabled
        self._tensorboard = tensorboard and enabled and _has_tensorboard()
        self._writer: Any = None
        self._file: BinaryIO | None = None

    def __enter__(self) -> RunLog:
        if self.enabled:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._file = (self.directory / "metrics.jsonl").open("ab")
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._close_writer()

    def log(self, phase: str, iteration: int, metrics: Mapping[str, float]) -> None:
        """Append one line; a number that is not finite becomes null, for json has none."""
        if self._file is None:
            return
        numbers = {name: float(value) for name, value in metrics.items()}
        line = {"phase": phase, "iteration": iteration}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        self._scalars(phase, iteration, numbers)

    def progress(self, phase: str, total: int, start: int = 0) -> Progress:
        """A bar of a phase from iteration ``start`` to ``total``; plain lines where stderr is no terminal."""
        return Progress(phase, total, start, enabled=self.enabled)

    def position(self) -> int:
        """Bytes of metrics.jsonl that are safe on disk: what a checkpoint keeps for ``truncate``."""
        if self._file is None:
            return 0
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
        if self._tensorboard:  # its files cannot be cut: write them anew
            self._close_writer()
            shutil.rmtree(self.directory / "tb", ignore_errors=True)
            for line in (self.directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                self._scalars(row.pop("phase"), row.pop("iteration"), row)

    def note(self, text: str) -> None:
        """Say one line on stderr without tearing the progress bar."""
        if self.enabled:
            tqdm.write(text, file=sys.stderr)

    def _scalars(self, phase: str, iteration: int, numbers: Mapping[str, float | None]) -> None:
        if not self._tensorboard:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.directory / "tb"))
        for name, value in numbers.items():
            self._writer.add_scalar(f"{phase}/{name}", math.nan if value is None else value, iteration)

    def _close_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


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
    text = json.dumps(obj, indent=2) + "\n"
    unfinished = Path(f"{path}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)


def _has_tensorboard() -> bool:
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        print("tensorboard is not installed, so tb/ stays empty: pip install tensorboard", file=sys.stderr)
        return False
    return True
