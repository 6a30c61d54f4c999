"""Kills a short run with SIGKILL, again and again, and compares its result with that of an uninterrupted one.

    python python_tests/kill_experiment.py [--kills 50] [--seed 0]

The run is 8gaussians with 300 iterations, evaluated on few points, and saves after every iteration, so that
about every second kill hits a save. Exits with 1 if any byte of model/ differs, or any line of metrics.jsonl
except for its timing fields, or if a kill damaged a checkpoint.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import threading
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

import runs
from deaths import leftovers
from dxmi_ext import cli
from dxmi_ext.engine.storage import checkpoint

_SETTINGS = [
    "pretrain_iterations=100",
    "iterations=200",
    "checkpoint_every=1",
    "log_every=5",
    "batch_size=64",
]
_SETTINGS += ["device=cpu", "tensorboard=false"]
_LIBRARIES = ("yaml", "pytest", "safetensors.torch", "sklearn.metrics", "torch._dynamo")


class Kill(NamedTuple):
    """The state that a kill left behind."""

    run: int
    seconds: float
    step: int  # step of the last checkpoint
    place: str


class Experiment:
    """Runs in separate processes, forked from a server that has imported everything.

    Args:
        folder: folder of the runs.
        settings: settings of the runs.
        seed: seed of the times of the kills.
    """

    def __init__(self, folder: Path, settings: list[str], seed: int) -> None:
        self._folder, self._settings, self._random = folder, settings, random.Random(seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["dxmi_ext.two_d.recipe", *_LIBRARIES])
        self.damage: list[str] = []
        self._reference, self._seconds = folder / "uninterrupted", 0.0
        self._session(self._reference, None)
        self._uninterrupted = self._seconds

    def kills(self, count: int) -> list[Kill]:
        """Kills runs until all have finished and the given number of kills is reached."""
        done: list[Kill] = []
        run = 0
        while len(done) < count:
            run += 1
            folder, finished = self._folder / f"run{run}", False
            while not finished:
                delay = (
                    self._random.uniform(0, 4 * self._uninterrupted / count) if len(done) < count else None
                )
                finished = self._session(folder, delay)
                if not finished:
                    done.append(Kill(run, self._seconds, *self._examine(folder)))
            self._compare(folder)
        return done

    def _session(self, folder: Path, delay: float | None) -> bool:
        """Runs one process; returns whether it finished before it was killed."""
        log = Path(f"{folder}.log")
        log.touch()
        size = log.stat().st_size
        process = self._context.Process(target=_run, args=(folder, self._settings, log))
        process.start()
        while process.is_alive() and log.stat().st_size == size:  # until it resumes or shows its progress
            time.sleep(0.002)
        started = time.monotonic()
        process.join(delay)
        self._seconds = time.monotonic() - started
        process.kill()
        process.join()
        if process.exitcode not in (0, -9):
            raise SystemExit(f"the run failed: {log.read_text()}")
        return process.exitcode == 0

    def _examine(self, folder: Path) -> tuple[int, str]:
        found = checkpoint.load_latest(folder / "checkpoints", self.damage.append)
        step = found[1]["step"] if found else 0
        if left := leftovers(folder):
            return step, f"in a save: {', '.join(left)}"
        return step, f"in {found[1]['phase']}" if found else "before the first checkpoint"

    def _compare(self, folder: Path) -> None:
        try:
            runs.assert_same_run(folder, self._reference)
        except AssertionError as error:
            self.damage.append(f"{folder} differs: {error}")
        self.damage += [f"{folder}: left behind: {name}" for name in leftovers(folder)]


def _run(folder: Path, settings: list[str], log: Path) -> None:
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which would outlive a killed process
    with log.open("a", buffering=1) as lines, redirect_stdout(lines), redirect_stderr(lines), runs.quick():
        sys.exit(cli.main(["train", "8gaussians", f"output={folder}", *settings]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        experiment = Experiment(Path(folder), _SETTINGS, options.seed)
        kills = experiment.kills(options.kills)
    print(f"{'kill':>4} {'run':>4} {'after s':>8} {'checkpoint':>11}  where")
    for number, kill in enumerate(kills, 1):
        print(f"{number:4} {kill.run:4} {kill.seconds:8.2f} {kill.step:11}  {kill.place}")
    in_save = sum(kill.place.startswith("in a save") for kill in kills)
    print(f"{len(kills)} kills, {in_save} of them in a save; {kills[-1].run} runs")
    print(*(experiment.damage or ["all ended as the uninterrupted one"]), sep="\n")
    return bool(experiment.damage)


if __name__ == "__main__":
    sys.exit(main())
