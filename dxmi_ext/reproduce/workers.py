"""Units run one after another or by several processes. Imports ``reproduce.units``."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Collection, Sequence
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from dxmi_ext.engine.errors import UserError
from dxmi_ext.engine.output import runlog, terminal
from dxmi_ext.engine.runs.signals import StopSignals
from dxmi_ext.reproduce import computing
from dxmi_ext.reproduce.units import Unit

_SECONDS_BETWEEN_LOOKS = 0.5


def run(missing: Sequence[Unit], workers: int) -> list[str]:
    """Runs units and returns the errors of those that failed. A single worker is this process."""
    if workers > 1 and len(missing) > 1:
        return _run_in_processes(missing, workers)
    failures = []
    for number, unit in enumerate(missing, 1):
        runlog.note(f"{unit.name}: {number} of {len(missing)}")
        try:
            computing.compute(unit)
        except (UserError, OSError) as error:
            failures.append(f"{unit.name}: {error}")
    return failures


def _run_in_processes(missing: Sequence[Unit], workers: int) -> list[str]:
    """`run` with several processes. A stop signal is passed on to all, and waits until they have saved."""
    waiting, failures = list(missing), list[str]()
    running: dict[Unit, tuple[SpawnProcess, float]] = {}
    bar = runlog.Progress("runs", len(missing), 0, enabled=True)
    with StopSignals() as signals, signals.held(), bar:
        try:
            while (waiting or running) and not signals.pending:
                while len(running) < workers and (unit := _ready(waiting, running)) is not None:
                    waiting.remove(unit)
                    running[unit] = _start(unit), time.monotonic()
                connection.wait([process.sentinel for process, _ in running.values()], _SECONDS_BETWEEN_LOOKS)
                for unit, (process, started) in list(running.items()):
                    if process.is_alive():
                        continue
                    del running[unit]
                    seconds = f"{time.monotonic() - started:.0f} s"
                    if process.exitcode:
                        failures.append(f"{unit.name}: exit status {process.exitcode}; see {_log_of(unit)}")
                    runlog.note(failures[-1] if process.exitcode else f"{unit.name}: done, {seconds}")
                    bar.update()
        finally:
            for process, _ in running.values():
                process.terminate()
            for process, _ in running.values():
                process.join()
    return failures


def _ready(waiting: Sequence[Unit], running: Collection[Unit]) -> Unit | None:
    """The first unit that does not depend on an unfinished one."""
    unfinished = {unit.folder for unit in (*waiting, *running)}
    return next((u for u in waiting if u.start is None or u.start.folder not in unfinished), None)


def _start(unit: Unit) -> SpawnProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(unit,), name=unit.name)
    # Blocked until the child has left the terminal's process group: this process passes Ctrl-C on.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return process


def _work(unit: Unit) -> None:
    """The main function of a worker process: writes to its log, and stops with its parent."""
    os.setsid()
    log = os.open(_log_of(unit), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    terminal.accept_any_text()
    threading.Thread(target=_follow_parent, daemon=True).start()
    try:
        computing.compute(unit)
    except (UserError, OSError) as error:
        sys.exit(f"{unit.name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _log_of(unit: Unit) -> Path:
    return unit.work / f"{unit.name}.log"


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
