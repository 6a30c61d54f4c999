"""Settings that every run has, and every `dxmi evaluate`. Imports ``engine.settings``."""

from __future__ import annotations

import dataclasses

from dxmi_ext.engine.settings import Config, Settings, device_setting, seed_setting, setting

PYTHON = "python"
"""In config.yaml, the task of a run of `dxmi_ext.fit`, which only a script can repeat."""
LARGEST_RUN = 10**7
"""Maximum iterations of a phase: four phases stay below the 10^8 of a checkpoint's name."""


@dataclasses.dataclass
class RunSettings(Settings):
    """The keys that every recipe has; a task has defaults of its own."""

    heading = "the run"
    recipe: str = setting(
        "", "name of the recipe, without a slash; by default that of its file", pattern=r"[^/]*"
    )
    task: str = setting("two_d", "task that runs the recipe")
    output: str | None = setting(None, "folder of the run; null: runs/RECIPE-TIME", path=True)
    seed: int = seed_setting("seed of every random choice")
    iterations: int = setting(1000, "iterations of DxMI", minimum=0, maximum=LARGEST_RUN)
    pretrain_iterations: int = setting(1000, "iterations of pretraining", minimum=0, maximum=LARGEST_RUN)
    pretrained: bool = setting(True, "pretraining before DxMI; false: training from scratch")
    batch_size: int = setting(
        256, "global batch size; the number of ranks must divide it", minimum=1, maximum=2**20
    )
    checkpoint_every: int = setting(1000, "iterations between checkpoints", minimum=1)
    keep_checkpoints: int = setting(2, "number of checkpoints kept", minimum=1)
    rollback_after: int = setting(
        50,
        "steps in a row that are not finite before the run rolls back to a checkpoint; 0: never",
        minimum=0,
    )
    rollbacks: int = setting(3, "rollbacks allowed before the run stops", minimum=0)
    rollback_lr: float = setting(0.5, "factor of all learning rates at each rollback", minimum=0)
    log_every: int = setting(50, "iterations between lines of metrics.jsonl", minimum=1)
    device: str = device_setting()
    threads: int = setting(0, "CPU threads of torch; 0: torch's default", minimum=0, maximum=1024)
    shard: bool = setting(False, "sharding of weights over ranks (FSDP2); false: every rank has all weights")
    resume: str = setting("auto", "checkpoint to resume from: auto, never or a path", path=True)
    picture_every: int = setting(1000, "iterations between pictures in pictures/; 0: none", minimum=0)
    tensorboard: bool = setting(True, "additional log in tb/ for tensorboard")
    wandb: str | None = setting(None, "project of Weights & Biases for an additional log; null: none")
    dry_run: bool = setting(False, "one iteration of each phase, with nothing written; also --dry-run")


@dataclasses.dataclass
class EvaluateSettings(Settings):
    """Settings of the command ``evaluate``, for tasks to extend."""

    output: str | None = setting(None, "json file to write the numbers to; null: none", path=True)
    seed: int = seed_setting("seed of samples and data")
    device: str = device_setting()


class RunnableConfig(Config):
    """Settings of any task, with the group that a `Run` reads."""

    run: RunSettings
