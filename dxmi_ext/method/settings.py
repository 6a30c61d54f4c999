"""Settings of the algorithm, and the rules between them. Imports the engine."""

from __future__ import annotations

import dataclasses
import re

from dxmi_ext.engine.settings import Effect, Rule, Settings, only_with, setting

LONGEST = 1000
"""Largest T of a sampler with several lengths."""


@dataclasses.dataclass
class DxMISettings(Settings):
    """Settings of the algorithm, in the paper's symbols. The defaults are Algorithm 1.

    Algorithm 2 is ``costs_in=sampler time_cost=sigmoid`` with a value network that does not see the timestep.

    Raises:
        ConfigError: a setting is out of its bounds.
    """

    heading = "the algorithm"

    tau: float = setting(0.1, "temperature of entropy and running cost", minimum=0)
    tau_entropy: float | None = setting(
        None, "temperature of the entropy alone (tau_1); null: tau", minimum=0
    )
    tau_velocity: float | None = setting(
        None, "temperature of the running cost alone (tau_2); null: tau", minimum=0
    )
    tau_rate: float = setting(
        0.0, "rate at which tau adapts to the data's entropy; 0: tau is fixed", minimum=0, maximum=1
    )
    tau_margin: float = setting(
        0.1,
        "margin of the samples' entropy over the data's with tau_rate, in nats per dimension; decays to 0 "
        "after tau_hold",
    )
    tau_hold: float = setting(
        0.5,
        "share of the run after which tau falls by tau_cooling, or the margin of tau_rate decays",
        minimum=0,
        below=1,
    )
    tau_cooling: float = setting(
        1.0,
        "factor by which a fixed tau falls after tau_hold, exponentially; meanwhile the averaged value and "
        "energy stay as they are; 1: tau stays",
        minimum=1e-3,
        maximum=1,
    )
    negatives: str = setting(
        "sampler",
        "negatives of the energy: sampler: its samples (DxMI); refined: Langevin chains started from these; "
        "short_run, persistent: Langevin chains from noise, which train the energy alone",
        choices=("sampler", "refined", "short_run", "persistent"),
    )
    energy_loss: str = setting(
        "contrast",
        "loss of the energy: contrast, the paper's; noise_contrastive (N2CE), which weights samples of high "
        "energy less",
        choices=("contrast", "noise_contrastive"),
    )
    noise_magnitude: float = setting(
        10.0, "magnitude M of N2CE; approaches maximum likelihood as it grows", minimum=1
    )
    data_noise: float = setting(
        0.0,
        "standard deviation of noise added to the data of the energy; without noise, an energy that sees "
        "more than the sampler can draw grows without bound",
        minimum=0,
    )
    gamma: float = setting(1.0, "weight of the squared energies in the energy loss", minimum=0)
    cost_reduction: str = setting(
        "mean",
        "reduction of costs over data dimensions; sum multiplies tau by D",
        choices=("mean", "sum"),
    )
    costs_in: str = setting(
        "both",
        "losses that include entropy and running cost: both, or one of them",
        choices=("both", "value", "sampler"),
    )
    time_cost: str = setting(
        "none",
        "time cost R(t) in the value's target; linear: .05 per step",
        choices=("none", "linear", "sigmoid"),
    )
    skip_last: int = setting(0, "number of last steps without entropy and running cost", minimum=0)
    td_order: str = setting(
        "backward",
        "order of the steps in the value's update; shuffled: each row starts at a random step",
        choices=("backward", "shuffled"),
    )
    td_redraw: bool = setting(False, "x_{t+1} redrawn from the current sampler, for the value's target")
    td_lambda: float = setting(
        0.0,
        "weight lambda of longer returns in the value's target, which use the log probabilities of the steps "
        "taken instead of the entropy bound; 0: one step, as in the paper; 1: whole paths",
        minimum=0,
        maximum=1,
    )
    td_weight: float = setting(
        1.0,
        "weight of the value's squared errors; below 1, an energy that shares the value's weights counts "
        "more",
        minimum=0,
    )
    velocity_decay: float = setting(
        0.99, "decay alpha of adaptive velocity regularization; 1: off", minimum=0, maximum=1
    )
    sampler_update: str = setting(
        "dxdp",
        "update of the sampler: dynamic programming, the policy gradient of GCD, or back-propagation through "
        "whole paths, which does not use the value",
        choices=("dxdp", "policy_gradient", "backprop"),
    )
    expected_cost: bool = setting(
        False,
        "mean of the running cost over the noise of the step in the sampler's loss; false: of the step "
        "taken, as in the paper, whose gradient is noisier",
    )
    sampler_steps: int = setting(
        2,
        "number of updates of the sampler per iteration, each on another step of the paths; T: on all steps",
        minimum=1,
        maximum=1000,
    )
    sampler_wait: int = setting(
        0, "number of first iterations in which the sampler is frozen while a new energy learns", minimum=0
    )
    train_last_std: bool = setting(True, "whether the last step's sigma is trained; false: it is frozen")
    sampler_lr: float = setting(5e-4, "learning rate of the sampler's network", minimum=0)
    log_std_lr: float = setting(1.5e-3, "learning rate of log sigma", minimum=0)
    value_lr: float = setting(
        1e-3, "learning rate of the value, and of an energy that shares its weights", minimum=0
    )
    energy_lr: float = setting(1e-3, "learning rate of a separate energy network", minimum=0)
    lr_decay: str = setting(
        "linear", "schedule of the learning rates", choices=("constant", "linear", "cosine")
    )
    adam_beta1: float = setting(
        0.9,
        "decay of the mean of gradients in Adam; 0: no momentum, as is usual in adversarial training",
        minimum=0,
        below=1,
    )
    adam_beta2: float = setting(
        0.999,
        "decay of the mean of squared gradients in Adam; with adam_beta1=0, a sudden gradient moves a weight "
        "by up to (1 - adam_beta2)^-1/2 learning rates",
        minimum=0,
        below=1,
    )
    sampler_clip: float = setting(0.1, "maximum gradient norm of the sampler; 0: no clipping", minimum=0)
    value_clip: float = setting(0.0, "maximum gradient norm of the value; 0: no clipping", minimum=0)
    energy_clip: float = setting(0.0, "maximum gradient norm of a separate energy; 0: no clipping", minimum=0)
    ema_decay: float = setting(
        0.995, "decay of the averaged networks, used for evaluation", minimum=0, below=1
    )

    @property
    def adam_betas(self) -> tuple[float, float]:
        """The decays of Adam's means."""
        return float(self.adam_beta1), float(self.adam_beta2)  # torch rejects a mixture with integers

    @property
    def entropy_tau(self) -> float:
        """The temperature of the entropy."""
        return self.tau if self.tau_entropy is None else self.tau_entropy

    @property
    def velocity_tau(self) -> float:
        """The temperature of the running cost."""
        return self.tau if self.tau_velocity is None else self.tau_velocity

    @property
    def trains_sampler(self) -> bool:
        """Whether a sampler is trained; otherwise the energy alone."""
        return self.negatives in ("sampler", "refined")


REMOVED = {"tau_rises": "an automatic tau may always rise"}
"""Settings of earlier versions; see `Config.removed`."""

RULES = (
    Rule(
        "tau must not be given with both tau_entropy and tau_velocity, which replace it, got {tau}",
        lambda s: "tau" not in s.given or None in (s.tau_entropy, s.tau_velocity),
    ),
    Rule(
        "costs_in must be both or sampler with sampler_update={sampler_update}, which does not train the "
        "sampler on the value, got {costs_in}",
        lambda s: s.sampler_update == "dxdp" or s.costs_in != "value" or not s.entropy_tau + s.velocity_tau,
    ),
    Rule(
        "expected_cost must be false with sampler_update={sampler_update}, got {expected_cost}",
        lambda s: s.sampler_update == "dxdp" or not s.expected_cost,
    ),
    Rule(
        "td_redraw must be false with td_lambda={td_lambda}, whose returns are of the path, got {td_redraw}",
        lambda s: not (s.td_lambda and s.td_redraw),
    ),
    *only_with(
        "energy_loss=noise_contrastive", lambda s: s.energy_loss == "noise_contrastive", "noise_magnitude"
    ),
    *only_with("negatives=sampler or refined", lambda s: s.trains_sampler, "data_noise"),
    Rule(
        "tau_rate must be 0 if the temperature of the entropy is 0, got {tau_rate}",
        lambda s: not s.tau_rate or bool(s.entropy_tau),
    ),
    Rule(
        "tau_cooling must be 1 with tau_rate={tau_rate}, which adapts tau to the end, got {tau_cooling}",
        lambda s: not s.tau_rate or s.tau_cooling == 1,
    ),
)
"""Rules between settings of the algorithm."""


def lengths(text: str) -> list[int]:
    """Numbers of steps given as text, such as 1,2,5; empty if it is invalid."""
    texts = text.split(",")
    numbers = [int(text) if re.fullmatch(r"\s*[0-9]{1,4}\s*", text) else 0 for text in texts]
    valid = all(1 <= steps <= LONGEST for steps in numbers) and len({*numbers}) == len(numbers)
    return numbers if valid else []


@dataclasses.dataclass
class LengthSettings(Settings):
    """The lengths of a sampler's chains, in the group of its chain."""

    steps: int = setting(5, "number of sampler steps T", minimum=1, maximum=LONGEST)
    lengths: str | None = setting(
        None,
        "numbers of steps of a sampler with several chains, such as 1,2,5, including steps; null: one chain",
    )
    length_draw: str = setting(
        "uniform",
        "distribution of T if there are several lengths: uniform; short: in proportion to 1 / T",
        choices=("uniform", "short"),
    )

    @property
    def all_steps(self) -> list[int]:
        """T of every chain; empty if ``lengths`` is invalid."""
        return [self.steps] if self.lengths is None else lengths(self.lengths)


LENGTH_RULES = (
    Rule(
        f"lengths must be distinct numbers of steps <= {LONGEST}, such as 1,2,5, got {{lengths}}",
        lambda s: bool(s.all_steps),
    ),
    Rule("lengths must include steps={steps}, got {lengths}", lambda s: s.steps in s.all_steps),
    Rule(
        "lengths must be >= 2 with schedule=edm, got {lengths}",
        lambda s: s.schedule != "edm" or min(s.all_steps) >= 2,
    ),
    Rule(
        "lengths must be null with cuda_graph, skip_last or Langevin negatives, got {lengths}",
        lambda s: s.lengths is None or (not (s.cuda_graph or s.skip_last) and s.trains_sampler),
    ),
)
"""Rules of tasks with `LengthSettings`."""

CHAIN_RULES = (
    Rule(
        "tau_rate must be 0 with Langevin chains, whose tau is fixed (negatives={negatives}, except refined "
        "with langevin_noise), got {tau_rate}",
        lambda s: (
            not s.tau_rate
            or s.negatives == "sampler"
            or (s.negatives == "refined" and s.langevin_noise is not None)
        ),
    ),
)
"""Rules between the algorithm and its Langevin chains."""

BATCH_RULES = (
    Rule(
        "batch_size must be >= 2 with tau_rate={tau_rate}, got {batch_size}",
        lambda s: not s.tau_rate or s.batch_size >= 2,
    ),
)
"""Rules between the algorithm and its batches."""

ENERGY_RULES = only_with(
    "value_kind=separate", lambda s: s.value_kind == "separate", "energy_lr", "energy_clip"
)
"""Rules of tasks whose energy may be part of the value."""

TAU_EFFECTS = (
    Effect("tau_rate > 0", lambda s: s.tau_rate > 0, ("tau_margin",)),
    Effect("tau_rate > 0 or tau_cooling < 1", lambda s: s.tau_rate > 0 or s.tau_cooling < 1, ("tau_hold",)),
)
EFFECTS = (
    *TAU_EFFECTS,
    Effect(
        "Langevin chains (negatives)",
        lambda s: s.negatives != "sampler",
        ("langevin_steps", "langevin_step_size", "langevin_noise", "langevin_clip"),
    ),
    Effect(
        "negatives=persistent",
        lambda s: s.negatives == "persistent",
        ("langevin_pool", "langevin_restart"),
    ),
    Effect("negatives=short_run or persistent", lambda s: not s.trains_sampler, ("langevin_sample_steps",)),
    Effect("lengths", lambda s: s.lengths is not None, ("length_draw",)),
)
"""Effects of the algorithm, its Langevin chains and `LengthSettings`."""
