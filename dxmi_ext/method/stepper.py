"""Base of all trainers: batches with noise keys, learning rates, and a state that resumes exactly.

Imports torch, the engine and ``method.noise``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dxmi_ext.engine.arguments import is_integer
from dxmi_ext.engine.compute import execution, sharding
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.graphs import Graphed
from dxmi_ext.engine.compute.ranks import Ranks
from dxmi_ext.engine.learning.learner import Learner
from dxmi_ext.engine.settings import LARGEST_SEED, ConfigError
from dxmi_ext.engine.storage.checkpoint import CheckpointError
from dxmi_ext.method import noise

Metrics = dict[str, Tensor]
"""Metrics of an iteration: scalars and vectors, on the device."""


class Batch(NamedTuple):
    """This rank's rows of a global batch, and the noise keys of the iteration."""

    data: Tensor
    """[N, *]"""
    labels: Tensor | None
    """[N], or None if the data have none."""
    offset: int
    """Global index of the first row."""
    keys: Mapping[str, Tensor]
    """Noise keys by use, each int64 [2]."""

    @property
    def n(self) -> int:
        return len(self.data)


class Stepper:
    """Trains networks iteration by iteration; an `engine.learning.steps.Trainable`.

    A subclass creates its learners and defines the iteration (`iterate`) and its state (`parts`).

    Args:
        seed: seed of every random choice; each is keyed by the global row, whatever the split of the batch.
        device: device of the networks.
        ranks: ranks that share the rows of a batch.
        execution: precision and compilation of the networks.
        uses: names of the noise keys of an iteration; their order is part of the format of saved runs.
        graphed: whether an iteration runs as one CUDA graph.

    Raises:
        ConfigError: the seed is out of range, the trained weights have several dtypes or another than float32
            and float64, or float64 weights are to run in bfloat16.
    """

    stream: ClassVar[str]
    """Name of the noise stream."""
    iterations: int
    """Length of the run."""
    learners: Sequence[Learner]
    memory_format = torch.contiguous_format
    """Memory format of the data passed to `iterate`."""
    data_shape: tuple[int, ...] | None = None
    """Shape (*) of a row of the data; None: any."""

    def __init__(
        self,
        *,
        seed: int,
        device: torch.device,
        ranks: Ranks,
        execution: ExecutionSettings,
        uses: Sequence[str] = (),
        graphed: bool = False,
    ) -> None:
        if not is_integer(seed) or not 0 <= seed <= LARGEST_SEED:
            raise ConfigError(f"seed must be an integer from 0 to {LARGEST_SEED}, got {seed!r}")
        self._dtype = _dtype_of(self.learners)
        if self._dtype not in (torch.float32, torch.float64):
            raise ConfigError(
                f"networks must have float32 or float64 weights, got {self._dtype}; "
                "ExecutionSettings(precision='bfloat16') runs them in bfloat16"
            )
        if execution.precision == "bfloat16" and self._dtype == torch.float64:
            raise ConfigError("precision must be float32 with float64 weights, got bfloat16")
        self.iteration, self.ranks, self.execution = 0, ranks, execution
        self._tried = execution.compile or ranks.shard  # a trial call would compile or gather once more
        self._seed, self._uses, self._device = int(seed), uses, device
        self._iterate: Callable[..., Metrics] = Graphed(self._run) if graphed else self._run
        self._draws = noise.Draws(self._seed, self.stream, uses, device)

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def device(self) -> torch.device:
        return self._device

    def begin(self) -> None:
        """Work on the host before an iteration."""

    def iterate(self, batch: Batch) -> Metrics:
        """Work on the device: the algorithm itself."""
        raise NotImplementedError

    def try_networks(self, data: Tensor, labels: Tensor | None) -> None:
        """Calls the networks once, on the first batch.

        Raises:
            ConfigError: one of them does not fit the data.
        """

    def parts(self) -> dict[str, Any]:
        """The state without the iteration: modules, optimizers and tensors, or dicts of them, by name. Names
        are part of the format of saved runs."""
        raise NotImplementedError

    def step(self, batch: Tensor | Sequence[Tensor]) -> Metrics:
        """One iteration.

        Args:
            batch: this rank's rows: data [B, *], or data and labels [B]. They are moved to the trainer's
                device, and are constants: no gradient reaches what they were computed from.

        Returns:
            The metrics, on the device; for each loss also ``NAME_failures``, the number of consecutive
            skipped steps. A `DxMITrainer` has the scalars energy_loss, energy_data, energy_sample,
            energy_spread, data_spread and sample_spread, value_loss, log_prob, sq_displacement, std and
            velocity_var [T], and sampler_loss [sampler_steps].

        Raises:
            ConfigError: the batch does not fit the networks, the run is at its end, one of several ranks'
                networks has weights that a call does not use, or inference mode is on.
        """
        if torch.is_inference_mode_enabled():
            raise ConfigError("step must be called outside torch.inference_mode(), which has no gradients")
        data, labels = self.checked(batch)
        for learner in self.learners:
            learner.rates.at(self.iteration)
        self.begin()
        with execution.running(self.execution, data.device), torch.enable_grad():
            try:
                metrics = self._iterate(self._draws.keys(self.iteration), data, labels)
            except RuntimeError as error:
                if "not used in producing loss" not in str(error):  # DistributedDataParallel's message
                    raise
                raise ConfigError(
                    "with several ranks, networks must use all their weights in every call, got some without "
                    "a gradient; freeze or remove them"
                ) from error
        self.iteration += 1
        return metrics

    def checked(self, batch: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """The data and labels of a batch, on the trainer's device. The first is also tried on the networks.

        Raises:
            ConfigError: they do not fit the networks.
        """
        parts: list[Any] = [*batch] if isinstance(batch, list | tuple) else [batch]
        if not 1 <= len(parts) <= 2 or not all(isinstance(part, Tensor) for part in parts):
            got = ", ".join(type(part).__name__ for part in parts)
            raise ConfigError(f"a batch must be a tensor of data, or data and labels, got ({got})")
        data, labels = parts[0], parts[1] if len(parts) == 2 else None
        shape = self.data_shape
        if not data.ndim or not len(data) or (shape is not None and data.shape[1:] != shape):
            wanted = "*" if shape is None else ", ".join(map(str, shape))
            raise ConfigError(f"a batch must have data of shape [B, {wanted}], B >= 1, got {[*data.shape]}")
        if self.memory_format == torch.channels_last and data.ndim != 4:
            raise ConfigError(
                f"channels_last must be false unless data are images [B, C, H, W], got {[*data.shape]}"
            )
        if data.dtype != self._dtype:
            raise ConfigError(f"a batch must have data of the networks' {self._dtype}, got {data.dtype}")
        if labels is not None and labels.shape != data.shape[:1]:
            raise ConfigError(f"the labels of a batch must have shape [{len(data)}], got {[*labels.shape]}")
        data, labels = self._here(data), None if labels is None else self._here(labels)
        if not self._tried:
            with execution.running(self.execution, self.device):
                self.try_networks(data, labels)
            self._tried = True
        return data, labels

    def _here(self, part: Tensor) -> Tensor:
        """A part of a batch on the device, as a constant that autograd can save."""
        part = part.detach().to(self.device)
        return part.clone() if part.is_inference() else part

    def _run(self, keys: Tensor, data: Tensor, labels: Tensor | None) -> Metrics:
        """`iterate` as a function of tensors, for a CUDA graph."""
        data = data.contiguous(memory_format=self.memory_format)
        batch = Batch(data, labels, self.ranks.rank * len(data), self._draws.named(keys))
        metrics = self.iterate(batch)
        failures = {name: count for learner in self.learners for name, count in learner.failures.items()}
        return metrics | {f"{name}_failures": count.clone() for name, count in failures.items()}

    def symptoms(self, numbers: Mapping[str, Any]) -> dict[str, str]:
        return {}

    def retry(self, attempt: int, lr_scale: float) -> None:
        stream = f"{self.stream}, attempt {attempt}" if attempt else self.stream
        self._draws = noise.Draws(self._seed, stream, self._uses, self._device)
        for learner in self.learners:
            learner.rates.scale = lr_scale

    def tallies(self) -> dict[str, Tensor]:
        return {name: tally for learner in self.learners for name, tally in learner.tallies.items()}

    def state_dict(self) -> dict[str, Any]:
        """The state required to resume exactly; noise keys follow from the iteration. Networks that draw from
        torch's generator themselves, as dropout does, resume with other draws."""
        return {"iteration": self.iteration, **_saved(self.parts()), "tallies": self.tallies()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a state of a trainer with the same networks and settings.

        Raises:
            CheckpointError: the state lacks parts.
            RuntimeError: names or shapes of weights differ.
        """
        parts = self.parts()
        if missing := [name for name in ("iteration", *parts) if name not in state]:
            raise CheckpointError(
                f"the state of a {type(self).__name__} must have {', '.join(missing)}, got {', '.join(state)}"
            )
        _load(parts, state)
        self.iteration = state["iteration"]
        if "tallies" in state:  # older states have none
            _load(self.tallies(), state["tallies"])
        if isinstance(self._iterate, Graphed):
            self._iterate.forget()  # the optimizers' moments are new tensors


def _dtype_of(learners: Sequence[Learner]) -> torch.dtype:
    """The dtype of the trained weights, and so of the data."""
    groups = [group["params"] for learner in learners for group in learner.optimizer.param_groups]
    weights = [weight for group in groups for weight in group]
    dtypes = {weight.dtype for weight in weights if weight.requires_grad} or {weights[0].dtype}
    if len(dtypes) > 1:
        names = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"networks must have weights of one dtype, got {names}; networks.to(dtype) converts all"
        )
    return dtypes.pop()


def _saved(part: Any) -> Any:
    if isinstance(part, dict):
        return {name: _saved(each) for name, each in part.items()}
    return part if isinstance(part, Tensor) else part.state_dict()


def _load(part: Any, state: Any) -> None:
    if isinstance(part, dict):
        for name, each in part.items():
            _load(each, state[name])
    elif isinstance(part, Tensor):
        part.copy_(sharding.like(state, part))
    elif isinstance(part, nn.Module):
        sharding.load_(part, state)
    else:
        part.load_state_dict(state)
