"""Settings of the task of 2D densities. Imports the engine, the method and ``two_d.densities``."""

from __future__ import annotations

import dataclasses

from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.run_settings import EvaluateSettings as EvaluateSettings_
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.settings import Effect, Rule, Settings, group, setting
from dxmi_ext.method.langevin import LangevinSettings
from dxmi_ext.method.settings import (
    BATCH_RULES,
    CHAIN_RULES,
    EFFECTS,
    ENERGY_RULES,
    LENGTH_RULES,
    LONGEST,
    REMOVED,
    RULES,
    DxMISettings,
    LengthSettings,
    lengths,
)
from dxmi_ext.two_d import densities


@dataclasses.dataclass
class DensitySettings(Settings):
    heading = "data"
    data: str = setting(
        "8gaussians",
        f"{', '.join(densities.DENSITIES)}, or FILE.npy or FILE.csv with points [N, 2]",
        pattern="|".join((*densities.DENSITIES, r".*\.(?i:npy|csv)")),
        path=True,
    )


@dataclasses.dataclass
class ChainSettings(LengthSettings):
    heading = "the sampler's chain"
    schedule: str = setting(
        "variance_exploding",
        "schedule of the sampler: variance_exploding: geometric levels from sigma_max to sigma_min; edm: "
        "EDM's levels with rho = 7 between these, with a network that predicts F; ddpm: DDPM with T linear "
        "betas from 1e-4 to .02; respaced_ddpm: T of the levels of DDPM with 1000 betas",
        choices=("variance_exploding", "edm", "ddpm", "respaced_ddpm"),
    )
    sigma_max: float = setting(3.0, "noise level of the sampler's first step", minimum=0)
    sigma_min: float = setting(0.4, "noise level of its last step", minimum=0)
    min_std: float = setting(0.05, "lower bound of the initial sigma of a step", minimum=1e-6)


@dataclasses.dataclass
class NetworkSettings(Settings):
    heading = "networks"
    sampler_width: int = setting(128, "width of the sampler's hidden layers", minimum=1, maximum=2**14)
    sampler_depth: int = setting(3, "number of hidden layers of the sampler", minimum=1, maximum=100)
    value_kind: str = setting(
        "per_step",
        "kind of value: per_step: a head for each step, the last one the energy; time_independent: V^t = E "
        "(Algorithm 2); separate: with a separate energy network",
        choices=("per_step", "time_independent", "separate"),
    )
    value_width: int = setting(128, "width of the value's hidden layers", minimum=1, maximum=2**14)
    value_depth: int = setting(3, "number of hidden layers of the value", minimum=1, maximum=100)
    step_input: str = setting(
        "index",
        "input for the step: index: a row of a table, for the trained numbers of steps; "
        "levels: its noise level, the previous and the next one, for any number of steps",
        choices=("index", "levels"),
    )
    random_spacing: float = setting(
        0.0,
        "share of iterations with step_input=levels whose chains have random noise levels between the first "
        "and the last one, for numbers of steps that are never trained",
        minimum=0,
        maximum=1,
    )
    octaves: int = setting(
        0,
        "number of wavelengths 8, 4, 2, ... of sinusoids of the coordinates in the networks' input",
        minimum=0,
        maximum=24,
    )


@dataclasses.dataclass
class PretrainingSettings(Settings):
    heading = "pretraining"
    pretrain_lr: float = setting(2e-3, "learning rate of pretraining, decayed to 0", minimum=0)


@dataclasses.dataclass
class EvaluationSettings(Settings):
    heading = "evaluation"
    untrained_lengths: str | None = setting(
        None,
        "numbers of steps, such as 3,7, with which a sampler with step_input=levels is evaluated although it "
        "is not trained with them; null: none",
    )

    @property
    def all_untrained(self) -> list[int]:
        """Each of ``untrained_lengths``; empty if there are none, or they are invalid."""
        return [] if self.untrained_lengths is None else lengths(self.untrained_lengths)

    samplings: int = setting(
        5, "number of samplings over which the final metrics are averaged", minimum=1, maximum=1000
    )


@dataclasses.dataclass
class Config(RunnableConfig):
    """Settings of a 2D run, with the recipes' defaults.

    Costs are means over dimensions, as in the authors' code. ``cost_reduction=sum`` doubles tau: the 8
    Gaussians then reach SW .094, AUROC .900.
    """

    run: RunSettings = group(
        RunSettings,
        task="two_d",
        iterations=5000,
        pretrain_iterations=600,
        batch_size=128,
        log_every=20,
        threads=1,  # more do not speed up small networks
    )
    algorithm: DxMISettings = group(DxMISettings)
    langevin: LangevinSettings = group(LangevinSettings)
    execution: ExecutionSettings = group(ExecutionSettings)
    density: DensitySettings = group(DensitySettings)
    chain: ChainSettings = group(ChainSettings)
    networks: NetworkSettings = group(NetworkSettings)
    pretraining: PretrainingSettings = group(PretrainingSettings)
    evaluation: EvaluationSettings = group(EvaluationSettings)

    removed = REMOVED
    rules = (
        Rule("task must be two_d, got {task}", lambda s: s.task == "two_d"),
        *RULES,
        *CHAIN_RULES,
        *BATCH_RULES,
        *ENERGY_RULES,
        Rule(
            "sigma_min must be > 0 and < sigma_max={sigma_max}, got {sigma_min}",
            lambda s: 0 < s.sigma_min < s.sigma_max,
        ),
        Rule(
            "steps must be >= 2 with schedule=edm, got {steps}", lambda s: s.schedule != "edm" or s.steps >= 2
        ),
        *LENGTH_RULES,
        Rule(
            f"untrained_lengths must be distinct numbers of steps <= {LONGEST}, such as 3,7, not in "
            "lengths, got {untrained_lengths}",
            lambda s: (
                s.untrained_lengths is None
                or (bool(s.all_untrained) and not {*s.all_untrained} & {*s.all_steps})
            ),
        ),
        Rule(
            "untrained_lengths must be null with step_input={step_input}, got {untrained_lengths}",
            lambda s: s.untrained_lengths is None or s.step_input == "levels",
        ),
        Rule(
            "random_spacing must be 0 without step_input=levels, got {random_spacing}",
            lambda s: not s.random_spacing or s.step_input == "levels",
        ),
        Rule(
            "random_spacing must be 0 with schedule={schedule}, got {random_spacing}",
            lambda s: not s.random_spacing or s.schedule in ("variance_exploding", "edm"),
        ),
        Rule(
            "untrained_lengths must be >= 2 with schedule=edm, got {untrained_lengths}",
            lambda s: s.untrained_lengths is None or s.schedule != "edm" or min(s.all_untrained) >= 2,
        ),
        Rule("skip_last must be <= steps={steps}, got {skip_last}", lambda s: s.skip_last <= s.steps),
        Rule(
            "cuda_graph must be false with device=cpu, got {cuda_graph}",
            lambda s: not (s.cuda_graph and s.device == "cpu"),
        ),
    )
    effects = (
        *EFFECTS,
        Effect(
            "schedule=variance_exploding or edm",
            lambda s: s.schedule in ("variance_exploding", "edm"),
            ("sigma_max", "sigma_min"),
        ),
        Effect(
            "pretraining (pretrained=true and negatives=sampler or refined)",
            lambda s: s.pretrained and s.trains_sampler,
            ("pretrain_iterations", *PretrainingSettings.keys()),
        ),
    )


@dataclasses.dataclass
class EvaluateSettings(EvaluateSettings_):
    """Settings of the command ``evaluate``."""

    data: str | None = setting(
        None, "FILE.npy or FILE.csv that holds the run's points now; null: unchanged", path=True
    )
    samplings: int | None = setting(
        None, "number of samplings over which metrics are averaged; null: as in training", minimum=1
    )
    log_partition: bool = setting(
        False,
        "whether to estimate log Z of the learned density exp(-E / w) / Z, and the log-likelihood of test "
        "data",
    )
    paths: int = setting(100_000, "paths of the sampler whose weights give log Z", minimum=2, maximum=10**7)
