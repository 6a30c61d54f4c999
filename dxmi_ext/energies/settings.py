"""Settings of the task of samplers of an energy. Imports the engine, the method and
``energies.targets``."""

from __future__ import annotations

import dataclasses

from dxmi_ext.energies.targets import TARGETS
from dxmi_ext.engine.run_settings import EvaluateSettings as EvaluateSettings_
from dxmi_ext.engine.run_settings import RunnableConfig, RunSettings
from dxmi_ext.engine.settings import Effect, Rule, Settings, group, setting
from dxmi_ext.method.settings import DxMISettings


@dataclasses.dataclass
class TargetSettings(Settings):
    heading = "the target, exp(-E / temperature) / Z"
    energy: str | None = setting(None, "name of a built-in energy", choices=tuple(TARGETS))
    target: str | None = setting(
        None,
        "your own energy instead of a built-in one: package.module:function, [N, D] -> [N]; the module is "
        "looked up in the current folder first",
    )
    dim: int | None = setting(None, "D, dimension of target=", minimum=1, maximum=2**16)
    particles: int | None = setting(
        None,
        "number of particles in x, whose energy is invariant under rotation, reflection and permutation; "
        "their center of mass is fixed at 0; null: x is one point",
        minimum=2,
        maximum=2**10,
    )
    target_source: str | None = setting(None, "hash of the module of target=, which a run sets itself")
    temperature: float = setting(1.0, "w, the temperature of the density", minimum=1e-6)
    energy_limit: float | None = setting(
        None,
        "energy above which training uses limit (1 + log(E / limit)) instead; null: none",
        minimum=1e-6,
    )


@dataclasses.dataclass
class ChainSettings(Settings):
    heading = "the sampler's chain"
    sampler: str = setting(
        "dxmi",
        "type of sampler: dxmi: a policy network and a sigma for each step; vgs: the gradient of the value",
        choices=("dxmi", "vgs"),
    )
    steps: int = setting(20, "T, number of steps of the sampler", minimum=1, maximum=1000)
    schedule: str = setting(
        "ve",
        "noise schedule: ve: variance-exploding; vp: variance-preserving, for sampler=vgs",
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
    damped_steps: bool = setting(
        True,
        "whether steps of sampler=vgs are damped, to end at the minimum of value and cost in a mode of "
        "variance var_last; false: the paper's steps, which go beyond it",
    )
    fit_stds: bool = setting(
        True,
        "whether sigmas are fitted at the end to paths drawn backwards from the sampler's own samples, which "
        "raises ESS; false: as trained, with lower energies where directions differ in width",
    )
    per_dimension: bool = setting(
        False,
        "mean and sigma of x_0 and unit of the noise for each dimension, found by a short annealing before "
        "training; for coordinates of different widths, whose narrowest keeps its unit",
    )


@dataclasses.dataclass
class NetworkSettings(Settings):
    heading = "networks"
    sampler_width: int = setting(128, "width of the policy's hidden layers", minimum=1, maximum=2**14)
    sampler_depth: int = setting(3, "number of hidden layers of the policy", minimum=1, maximum=100)
    value_width: int = setting(128, "width of the value's hidden layers", minimum=1, maximum=2**14)
    value_depth: int = setting(3, "number of hidden layers of the value", minimum=1, maximum=100)
    octaves: int = setting(
        0,
        "number of sinusoids of each coordinate, or distance, as inputs of networks, with wavelengths 8 "
        "scale, 4 scale, ...",
        minimum=0,
        maximum=24,
    )


@dataclasses.dataclass
class LearningSettings(Settings):
    heading = "learning, of both samplers"
    value_lr: float | None = setting(None, "learning rate of the value; null: 1e-3", minimum=0)
    start_lr: float = setting(1e-3, "learning rate of the mean and log sigma of x_0", minimum=0)
    lr_decay: str = setting(
        "linear", "schedule of the learning rates", choices=("constant", "linear", "cosine")
    )
    value_clip: float = setting(1.0, "maximum gradient norm of the value; 0: no clipping", minimum=0)


@dataclasses.dataclass
class GradientSettings(Settings):
    """Settings of the Value Gradient Sampler alone."""

    heading = "learning, of sampler=vgs"
    replay: float = setting(
        0.0,
        "share of iterations on paths drawn backwards from the last 10,000 ends of paths; 0: none",
        minimum=0,
        below=1,
    )


@dataclasses.dataclass
class PolicySettings(Settings):
    """Settings of Algorithm 1 with its energy fixed."""

    heading = "learning, of sampler=dxmi"
    sampler_lr: float = setting(1e-3, "learning rate of the policy's network", minimum=0)
    log_std_lr: float = setting(1e-3, "learning rate of log sigma", minimum=0)
    sampler_clip: float = setting(1.0, "maximum gradient norm of the policy; 0: no clipping", minimum=0)
    sampler_steps: int = setting(10, "number of policy steps in an iteration", minimum=1, maximum=1000)
    td_lambda: float = setting(
        0.95,
        "weight lambda of longer returns in the value's target; 0: one step, as in the paper; 1: whole paths",
        minimum=0,
        maximum=1,
    )
    expected_cost: bool = setting(
        True,
        "mean of the running cost over the noise of the step in the policy's loss; false: of the step taken, "
        "as in the paper, whose gradient is noisier",
    )
    velocity_decay: float = setting(
        1.0,
        "decay alpha of adaptive velocity regularization of s_t^2, which starts at the variance of the step; "
        "1: off",
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
        """Settings of a `DxMITrainer`."""
        return DxMISettings(
            tau=temperature,
            cost_reduction="sum",
            td_order="shuffled",
            td_lambda=self.td_lambda,
            expected_cost=self.expected_cost,
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
class EvaluationSettings(Settings):
    heading = "evaluation"
    paths: int = setting(10_000, "number of paths for log Z", minimum=2, maximum=10**7)
    compared: int = setting(
        2000, "number of samples compared with samples of the target", minimum=2, maximum=2000
    )
    last_noise: float = setting(
        1.0,
        "factor of the last step's noise in samples, not in the paths that give log Z, whose density it "
        "would change",
        minimum=0,
        maximum=1,
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
    gradient: GradientSettings = group(GradientSettings)
    policy: PolicySettings = group(PolicySettings)
    evaluation: EvaluationSettings = group(EvaluationSettings)

    removed = dict.fromkeys(
        ("path_noise", "td_passes", "td_loss", "target_decay"), "sampler=vgs has a fixed value"
    )
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
    effects = (
        Effect(
            "sampler=dxmi",
            lambda s: s.sampler == "dxmi",
            ("sampler_width", "sampler_depth", *PolicySettings.keys()),
        ),
        Effect("sampler=vgs", lambda s: s.sampler == "vgs", ("damped_steps", *GradientSettings.keys())),
        Effect("steps > 1", lambda s: s.steps > 1, ("var_last",)),
        Effect("pretraining, which this task does not have", lambda s: False, ("pretrain_iterations",)),
    )


@dataclasses.dataclass
class EvaluateSettings(EvaluateSettings_):
    """Settings of the command ``evaluate``."""

    log_partition: bool = setting(True, "whether log Z and its bounds are estimated")
    annealing: int | None = setting(
        None,
        "levels of annealed importance sampling of 2,000 particles, to compare with; null: none",
        minimum=1,
        maximum=10**6,
    )
    tempering: int | None = setting(
        None,
        "sweeps of parallel tempering of 100 chains of 20 replicas, to compare with; null: none",
        minimum=2,
        maximum=10**6,
    )
    paths: int | None = setting(None, "number of paths for log Z; null: as in training", minimum=2)
    compared: int | None = setting(
        None,
        "number of samples compared with samples of the target; null: as in training",
        minimum=2,
        maximum=2000,
    )
