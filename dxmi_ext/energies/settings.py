"""Settings of the task of samplers of an energy. Imports the engine and ``energies.targets``."""

from __future__ import annotations

import dataclasses

from dxmi_ext.energies.targets import TARGETS
from dxmi_ext.engine.run_settings import EvaluateSettings as EvaluateSettings_
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.settings import Rule, Settings, group, setting
from dxmi_ext.method.settings import DxMISettings


@dataclasses.dataclass
class TargetSettings(Settings):
    heading = "the target, exp(-E / temperature) / Z"
    energy: str | None = setting(None, "one of the energies that ship", choices=tuple(TARGETS))
    target: str | None = setting(
        None,
        "an energy of one's own in place of it, package.module:function, [N, D] -> [N]; the module is looked "
        "up in the current folder first",
    )
    dim: int | None = setting(None, "D, of target=", minimum=1, maximum=2**16)
    particles: int | None = setting(
        None,
        "number of particles that x is made of, whose energy does not change with rotation, reflection and "
        "order; their centre of mass is held at 0; null: x is one point",
        minimum=2,
        maximum=2**10,
    )
    target_source: str | None = setting(None, "hash of the module of target=; a run fills it in")
    temperature: float = setting(1.0, "w, the temperature of the density", minimum=1e-6)
    energy_limit: float | None = setting(
        None,
        "energy above which training sees its logarithm only, limit (1 + log(E / limit)); null: none",
        minimum=1e-6,
    )


@dataclasses.dataclass
class ChainSettings(Settings):
    heading = "the sampler's chain"
    sampler: str = setting(
        "dxmi",
        "sampler: dxmi: a policy network and a sigma for each step; vgs: the gradient of the value",
        choices=("dxmi", "vgs"),
    )
    steps: int = setting(20, "T, steps of the sampler", minimum=1, maximum=1000)
    schedule: str = setting(
        "ve",
        "noise: ve: variance-exploding; vp: variance-preserving, for sampler=vgs",
        choices=("ve", "vp"),
    )
    spacing: str = setting(
        "exp",
        "spacing of the variances of steps: linear, quad (linear in their roots) or exp (geometric)",
        choices=("linear", "quad", "exp"),
    )
    var_first: float = setting(10.0, "variance of the first step's noise, times T", minimum=1e-9)
    var_last: float = setting(
        0.1,
        "variance of the last step's noise, times T; about the variance of the narrowest mode",
        minimum=1e-9,
    )
    scale: float = setting(1.0, "standard deviation of the target, roughly", minimum=1e-6)
    per_dimension: bool = setting(
        False,
        "mean and sigma of x_0 and unit of the noise for each dimension, found by a short annealing before "
        "training; for coordinates of different widths, whose narrowest keeps its unit",
    )


@dataclasses.dataclass
class NetworkSettings(Settings):
    heading = "networks"
    sampler_width: int = setting(128, "width of the policy's hidden layers", minimum=1, maximum=2**14)
    sampler_depth: int = setting(3, "hidden layers of the policy", minimum=1, maximum=100)
    value_width: int = setting(128, "width of the value's hidden layers", minimum=1, maximum=2**14)
    value_depth: int = setting(3, "hidden layers of the value", minimum=1, maximum=100)
    octaves: int = setting(
        0,
        "sinusoids of coordinates, or of distances, that networks see beside them: wavelengths 8 scale and "
        "halves of it",
        minimum=0,
        maximum=24,
    )


@dataclasses.dataclass
class LearningSettings(Settings):
    heading = "learning, of both samplers"
    value_lr: float | None = setting(
        None, "learning rate of the value; null: 1e-3 with sampler=dxmi, 3e-4 with vgs", minimum=0
    )
    start_lr: float = setting(1e-3, "learning rate of log sigma of x_0", minimum=0)
    lr_decay: str = setting(
        "linear", "schedule of the learning rates", choices=("constant", "linear", "cosine")
    )
    value_clip: float = setting(1.0, "largest gradient norm of the value; 0: any", minimum=0)


@dataclasses.dataclass
class PolicySettings(Settings):
    """Settings of Algorithm 1 with its energy fixed."""

    heading = "learning, of sampler=dxmi"
    sampler_lr: float = setting(1e-3, "learning rate of the policy's network", minimum=0)
    log_std_lr: float = setting(1e-3, "learning rate of log sigma", minimum=0)
    sampler_clip: float = setting(1.0, "largest gradient norm of the policy; 0: any", minimum=0)
    sampler_steps: int = setting(10, "policy steps an iteration", minimum=1, maximum=1000)
    velocity_decay: float = setting(
        1.0,
        "alpha of adaptive velocity regularisation of s_t^2, which starts at the step's variance; 1: off",
        minimum=0,
        maximum=1,
    )
    std_floor: float = setting(
        0.9,
        "smallest sigma of a step, as a share of the standard deviation of its noising kernel; 0: none",
        minimum=0,
        maximum=10,
    )
    ema_decay: float = setting(
        0.99, "decay of the averaged networks, used for evaluation", minimum=0, below=1
    )

    def algorithm(self, learning: LearningSettings, temperature: float) -> DxMISettings:
        """As the settings of a `DxMITrainer`."""
        return DxMISettings(
            tau=temperature,
            cost_reduction="sum",
            td_order="shuffled",
            velocity_decay=self.velocity_decay,
            sampler_steps=self.sampler_steps,
            sampler_lr=self.sampler_lr,
            log_std_lr=self.log_std_lr,
            value_lr=1e-3 if learning.value_lr is None else learning.value_lr,
            lr_decay=learning.lr_decay,
            sampler_clip=self.sampler_clip,
            value_clip=learning.value_clip,
            ema_decay=self.ema_decay,
        )


@dataclasses.dataclass
class GradientSettings(Settings):
    heading = "learning, of sampler=vgs"
    path_noise: float = setting(
        1.1, "factor of the noise of the paths that the value learns from", minimum=1e-3
    )
    td_passes: int = setting(1, "passes over the steps of all paths, an iteration", minimum=1, maximum=100)
    td_loss: str = setting("mse", "loss of the value, both sides divided by D", choices=("mse", "smooth_l1"))
    target_decay: float = setting(
        0.9, "decay of the target network, which follows the value once an iteration", minimum=0, below=1
    )


@dataclasses.dataclass
class EvaluationSettings(Settings):
    heading = "evaluation"
    paths: int = setting(10_000, "paths whose weights give log Z", minimum=2, maximum=10**7)
    compared: int = setting(
        2000, "samples that are compared with samples of the target", minimum=2, maximum=2000
    )


@dataclasses.dataclass
class Config(RunnableConfig):
    """Settings of a sampler of an energy."""

    run: RunSettings = group(
        RunSettings,
        task="energies",
        iterations=2000,
        pretrained=False,
        batch_size=256,
        log_every=20,
        threads=1,  # networks of this size gain nothing from more
    )
    target: TargetSettings = group(TargetSettings)
    chain: ChainSettings = group(ChainSettings)
    networks: NetworkSettings = group(NetworkSettings)
    learning: LearningSettings = group(LearningSettings)
    policy: PolicySettings = group(PolicySettings)
    gradient: GradientSettings = group(GradientSettings)
    evaluation: EvaluationSettings = group(EvaluationSettings)

    rules = (
        Rule("task must be energies, got {task}", lambda s: s.task == "energies"),
        Rule(
            "pretrained must be false: there are no data to pretrain on, got {pretrained}",
            lambda s: not s.pretrained,
        ),
        Rule("shard must be false, got {shard}", lambda s: not s.shard),
        Rule(
            "dim must be given with target={target}, got {dim}",
            lambda s: s.target is None or s.dim is not None,
        ),
        Rule(
            "particles={particles} must divide dim, got {dim}",
            lambda s: None in (s.particles, s.dim) or s.dim % s.particles == 0,
        ),
        Rule(
            "per_dimension must be false with particles={particles}, got {per_dimension}",
            lambda s: s.particles is None or not s.per_dimension,
        ),
        Rule(
            "schedule must be ve with sampler=dxmi, got {schedule}",
            lambda s: s.sampler == "vgs" or s.schedule == "ve",
        ),
        Rule(
            "var_first and var_last must be < steps={steps} with schedule=vp, got {var_first} and {var_last}",
            lambda s: s.schedule == "ve" or max(s.var_first, s.var_last) < s.steps,
        ),
    )


@dataclasses.dataclass
class EvaluateSettings(EvaluateSettings_):
    """Settings of the command ``evaluate``."""

    log_partition: bool = setting(True, "log Z and its bounds by the weights of paths")
    annealing: int | None = setting(
        None,
        "levels of annealed importance sampling to compare with, of 2,000 particles; null: none",
        minimum=1,
        maximum=10**6,
    )
    tempering: int | None = setting(
        None,
        "sweeps of parallel tempering to compare with, of 100 chains of 20 replicas; null: none",
        minimum=2,
        maximum=10**6,
    )
    paths: int | None = setting(None, "paths whose weights give log Z; null: as in training", minimum=2)
    compared: int | None = setting(
        None,
        "samples that are compared with samples of the target; null: as in training",
        minimum=2,
        maximum=2000,
    )
