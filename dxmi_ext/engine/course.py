"""The course of a recipe's run: training, or pretraining alone. Imports the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dxmi_ext.engine.compute.execution import ExecutionSettings, check_graph, emulates_bfloat16
from dxmi_ext.engine.output import runlog
from dxmi_ext.engine.run import Run

Finish = Callable[[], tuple[dict[str, Any], str]]
"""Saves and evaluates the trained networks; returns the numbers for summary.json, and a text to print."""


def train(
    run: Run, learn: Callable[[], Finish], made: str, execution: ExecutionSettings | None = None
) -> dict[str, Any]:
    """Carries out a run, unless it is finished.

    Args:
        run: the run, which is opened here.
        learn: builds and trains the networks; on all ranks. What it returns is called on the first rank
            only, and not in a dry run.
        made: name of the pictures that the run's folder may get beside summary.json and model/.
        execution: settings that are checked first, if the task has them.

    Returns:
        The summary; empty if the run was finished already, in a dry run, and on ranks other than the first.

    Raises:
        ConfigError: see `check_execution`; and what ``learn`` and `Run` raise.
    """
    if run.finished():
        return {}
    if execution is not None:
        check_execution(run, execution)
    with run:
        finish = learn()
        if run.settings.dry_run or not run.ranks.first:
            return {}
        numbers, text = finish()
        summary = run.summarize(numbers)
    print(text)
    made = f", {made}" if any(run.directory.glob("*.png")) else ""
    print(f"{run.directory}: summary.json, model/{made}; {summary['wall_seconds']} s")
    return summary


def pretrain(
    run: Run,
    learn: Callable[[], Callable[[], None]],
    text: str,
    execution: ExecutionSettings | None = None,
) -> None:
    """Carries out the pretraining of a run alone, unless it is past that.

    Args:
        run: the run, which is opened here.
        learn: builds and pretrains the networks; on all ranks. What it returns saves them; it is called on
            the first rank only, and not in a dry run.
        text: what to print at the end, after the run's folder, which replaces {directory} in it.
        execution: settings that are checked first, if the task has them.
    """
    if run.finished():
        return
    if execution is not None:
        check_execution(run, execution)
    with run:
        if "pretrain" in run.past:
            print(f"{run.directory} is past its pretraining; nothing to do")
            return
        save = learn()
        if run.settings.dry_run or not run.ranks.first:
            return
        save()
        print(f"{run.directory}: {text.format(directory=run.directory)}")


def check_execution(run: Run, execution: ExecutionSettings) -> None:
    """Checks how networks are to run, and notes what makes the run slow or appear to hang.

    Raises:
        ConfigError: see `check_graph`.
    """
    check_graph(execution, run.device, run.ranks)
    if not run.ranks.first:
        return
    if execution.precision == "bfloat16" and emulates_bfloat16(run.device):
        runlog.note(
            "precision=bfloat16 is emulated on this processor, many times slower than float32: "
            "it has neither AVX-512 nor bfloat16 instructions"
        )
    if execution.compile:
        runlog.note("compile=true compiles the networks in the first iterations, which can take minutes")
