"""The command ``dxmi reproduce`` on tiny runs, to start as a process; its workers import this file, too.

python reproduce_command.py ARGUMENTS
"""

from __future__ import annotations

import sys

import runs
from dxmi_ext import cli
from dxmi_ext.reproduce import experiments, plots
from dxmi_ext.reproduce.command import EXPERIMENTS
from dxmi_ext.two_d import metrics
from dxmi_ext.two_d import recipe as two_d

LENGTH = {"pretrain_iterations": 40, "batch_size": 16}
TINY = experiments.Experiment(
    "tiny",
    "Tiny runs",
    [
        experiments.Row("a", "DxMI", LENGTH | {"iterations": 60}, {"auroc": (0.9, 0.01)}),
        experiments.Row("b", "DDPM", LENGTH | {"iterations": 0, "schedule": "ddpm", "steps": 3}),
        experiments.Row("endless", "endless", LENGTH | {"iterations": 1_000_000, "log_every": 1}),
        experiments.Row("bad", "bad", LENGTH | {"iterations": 60, "value_lr": 1e30, "rollbacks": 0}),
    ],
)

if __name__ in ("__main__", "__mp_main__"):  # the command and its workers
    metrics.evaluate = runs.FEW_POINTS
    two_d.draw_pictures = plots.gallery = lambda *_: None  # they take seconds
    EXPERIMENTS["tiny"] = TINY

if __name__ == "__main__":
    sys.exit(cli.main(sys.argv[1:]))
