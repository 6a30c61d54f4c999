"""The fused ops of DxMI, for any training loop. Requires only torch and numpy.

N rows (batch), ``*`` data dimensions, D their product, T steps. ``timestep`` is the generation step
0..T-1, noise to data, never a diffusion time. Samples are float32, bfloat16, float16 or float64; row
results and tables are float32, or float64 for float64 samples. Samples may be contiguous, channels_last
or strided; nothing is copied to make them contiguous. Log-probabilities and costs are means over D, the
field's convention (DxMI's paper writes sums).

Noise comes from a key, not from torch's generators: element i of row n at step t is a fixed function of
(key, t, sample_offset + n, i), whatever the device, memory format or split of the batch. The backward pass
replays it, so none is stored.

Every op supports autograd, ``torch.compile(fullgraph=True)`` and ``torch.func.grad``, except torch.func
inside torch.compile. All but `normal` and `update_velocity_var_` support ``torch.func.vmap`` and ``jacrev``,
which call them element by element. Second and forward-mode derivatives raise an error, and so does an
argument that requires grad if the op has no gradient for it: coefficients such as ``gamma`` are constants.
Any two arguments may be the same tensor. Invalid input raises a TypeError, ValueError or RuntimeError that
names the op and the argument. Values (``timestep`` in 0..T-1, ``velocity_var`` > 0) are checked on the CPU;
on CUDA, where that would require a synchronization, invalid ones give rows of NaN, and an invalid timestep
gives a gradient of NaN for all of log_std.

On CUDA, ops run on the current stream without synchronization, so they may be captured in a CUDA graph: after
a warm-up, with a key that advances within the graph, ``key.copy_(next_key(key))`` after the backward pass.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi_ext import _gradients, _native, _shapes  # noqa: F401 - for their effect

__all__ = [
    "INITIAL_TIMESTEP",
    "StepOutput",
    "energy_loss",
    "next_key",
    "noise_key",
    "normal",
    "running_cost",
    "sampler_step",
    "td_target",
    "transition_log_prob",
    "update_velocity_var_",
]

INITIAL_TIMESTEP = 2**32 - 1
"""Timestep reserved for the noise of x_0; no step of a sampler uses it."""

SAMPLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_ops = torch.ops.dxmi_ext


# --- noise -------------------------------------------------------------------------------------------


def noise_key(
    seed: int | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Creates a noise key (seed, draw = 0).

    Args:
        seed: integer from -2^63 to 2^64 - 1; None draws one from ``generator`` or torch's default generator.
        generator: source of the seed if ``seed`` is None.
        device: device of the key, and so of the samples. Default: the generator's device, or torch's default.

    Returns:
        int64 [2].

    Raises:
        TypeError, ValueError: an argument is of another type, or ``seed`` out of range or given with a
            generator.
    """
    if not isinstance(generator, torch.Generator | None):
        got = type(generator).__name__
        raise TypeError(f"dxmi_ext.ops.noise_key: generator must be a torch.Generator or None, got {got}")
    if seed is None:
        if device is None and generator is not None:
            device = generator.device
        if torch.compiler.is_compiling() and generator is None:  # Dynamo does not trace random_
            drawn = torch.randint(2**63 - 1, (), device=device)
        else:
            drawn = torch.empty((), dtype=torch.int64, device=device).random_(generator=generator)
        return torch.stack((drawn, torch.zeros_like(drawn)))
    if generator is not None:
        raise ValueError("dxmi_ext.ops.noise_key: seed must be None with a generator, got both")
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise TypeError(f"dxmi_ext.ops.noise_key: seed must be an int or None, got {type(seed).__name__}")
    seed = operator.index(seed)  # converts numpy's integers
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"dxmi_ext.ops.noise_key: seed must be in [-2**63, 2**64), got {seed}")
    key = torch.zeros(2, dtype=torch.int64, device=device)
    key[:1].fill_(seed - 2**64 if seed >= 2**63 else seed)  # no copy from the host, so no sync
    return key


def next_key(key: Tensor) -> Tensor:
    """The key of the next draw: a new tensor (seed, draw + 1), without a host sync. ``key`` is not changed,
    since a pending backward pass may still replay its noise."""
    _check_key("next_key", key)
    return key + torch.arange(2, dtype=torch.int64, device=key.device)


def normal(
    shape: Sequence[int],
    key: Tensor,
    *,
    timestep: int = INITIAL_TIMESTEP,
    sample_offset: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal z [N, *], the noise that `sampler_step` uses at ``timestep``.

    Args:
        shape: (N, *).
        key: int64 [2], from `noise_key`; the result is on its device.
        timestep: integer in 0..2**32 - 1; the default is reserved for x_0.
        sample_offset: global index of the first row, in 0..2**32 - N.
        dtype: dtype of the result, converted from float32.
    """
    _check_key("normal", key)
    if dtype not in SAMPLE_DTYPES:
        raise TypeError(f"dxmi_ext.ops.normal: dtype must be one of {SAMPLE_DTYPES}, got {dtype}")
    sizes = _sizes(shape)
    if not sizes or min(sizes) < 0:
        raise ValueError(f"dxmi_ext.ops.normal: shape must be (N, *), of integers >= 0, got {shape}")
    _gradients.refuse_gradients("normal", timestep=timestep, sample_offset=sample_offset)
    out = torch.empty(sizes, dtype=dtype, device=key.device)
    try:
        _ops.normal_(out, key, timestep, sample_offset)
    except RuntimeError as error:
        _gradients.refuse_type("normal", error)
        raise
    return out


# --- the sampler's transition ------------------------------------------------------------------------


class StepOutput(NamedTuple):
    """One step of the sampler."""

    next_sample: Tensor
    """[N, *], in sample's dtype and memory format."""
    log_prob: Tensor
    """[N]: mean over D of log N(next_sample; mean, std^2)."""
    sq_displacement: Tensor
    """[N]: mean over D of (next_sample - sample)^2."""


def sampler_step(
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor,
    sample_coef: Tensor,
    output_coef: Tensor,
    log_std: Tensor,
    key: Tensor,
    *,
    sample_offset: int = 0,
) -> StepOutput:
    """One reparametrized step of the sampler, with its log-probability and displacement.

    ``next_sample = sample_coef[t] sample + output_coef[t] model_output + exp(log_std[t]) z``. The row results
    are taken before next_sample is rounded to its dtype; ``log_std = -inf`` makes a step deterministic.
    Differentiable in sample, model_output and log_std through all three outputs, with z constant.

    Args:
        sample: x_t [N, *].
        model_output: [N, *], with sample's dtype and device.
        timestep: int64 [N].
        sample_coef, output_coef, log_std: [T].
        key: int64 [2], from `noise_key`.
        sample_offset: global index of the first row, in 0..2**32 - N.
    """
    return StepOutput(
        *_gradients.call(
            _gradients.STEP,
            sample,
            model_output,
            timestep,
            sample_coef,
            output_coef,
            log_std,
            key,
            sample_offset,
        )
    )


def transition_log_prob(
    next_sample: Tensor,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor,
    sample_coef: Tensor,
    output_coef: Tensor,
    log_std: Tensor,
) -> Tensor:
    """Log-probability of a given transition: mean over D of log N(next_sample; mean, exp(log_std[t])^2), [N].

    Differentiable in next_sample, sample, model_output and log_std. Unlike `sampler_step`'s log_prob, it
    treats the next sample as fixed, as policy gradients require (GCD, arXiv 2312.03397). A step with std 0
    has no density; its rows are not finite, nor are those where 1 / std overflows (float32: log_std < -88).

    Args:
        next_sample: x_{t+1} [N, *], like sample.
        sample, model_output, timestep, sample_coef, output_coef, log_std: see `sampler_step`.
    """
    return _gradients.call(
        _gradients.LOG_PROB, next_sample, sample, model_output, timestep, sample_coef, output_coef, log_std
    )


# --- costs and losses --------------------------------------------------------------------------------


def running_cost(
    sq_displacement: Tensor,
    timestep: Tensor,
    log_std: Tensor,
    velocity_var: Tensor,
    tau_entropy: float,
    tau_velocity: float,
    *,
    skip_last: int = 0,
) -> Tensor:
    """Velocity cost minus entropy bound for each row (DxMI, Alg. 1), [N].

    ``tau_velocity sq_displacement / (2 velocity_var[t]) - tau_entropy log_std[t]``, and zero for
    t >= T - skip_last. Differentiable in sq_displacement and log_std.

    Args:
        sq_displacement: [N], float32 or float64, like the tables.
        timestep: int64 [N].
        log_std, velocity_var: [T]; velocity_var is s_t^2, positive.
        tau_entropy: temperature of the entropy, tau_1 in the paper.
        tau_velocity: temperature of the velocity cost, tau_2 in the paper.
        skip_last: number of last steps without cost.
    """
    return _gradients.call(
        _gradients.COST,
        sq_displacement,
        timestep,
        log_std,
        velocity_var,
        tau_entropy,
        tau_velocity,
        skip_last,
    )


def td_target(
    next_value: Tensor,
    sq_displacement: Tensor,
    timestep: Tensor,
    log_std: Tensor,
    velocity_var: Tensor,
    time_cost: Tensor,
    tau_entropy: float,
    tau_velocity: float,
    *,
    skip_last: int = 0,
) -> Tensor:
    """The value's regression target: next_value + `running_cost` + time_cost[t] (DxMI, Alg. 1 and 2): [N].

    Builds no graph: next_value, sq_displacement and log_std are constants here even if they require grad. A
    bfloat16 or float16 next_value is widened to sq_displacement's dtype.

    Args:
        next_value: V^{t+1}(x_{t+1}), [N].
        time_cost: R(t), [T]; see `running_cost` for the other arguments.
    """
    _gradients.refuse_gradients(
        "td_target",
        velocity_var=velocity_var,
        time_cost=time_cost,
        tau_entropy=tau_entropy,
        tau_velocity=tau_velocity,
        skip_last=skip_last,
    )
    if isinstance(sq_displacement, Tensor):
        next_value = _widened(next_value, sq_displacement.dtype)
    try:
        with torch.no_grad():
            return _ops.td_target(
                next_value,
                sq_displacement,
                timestep,
                log_std,
                velocity_var,
                time_cost,
                tau_entropy,
                tau_velocity,
                skip_last,
            )
    except RuntimeError as error:
        _gradients.refuse_type("td_target", error)
        raise


def energy_loss(energy_data: Tensor, energy_sample: Tensor, gamma: float) -> Tensor:
    """mean Ed - mean Es + gamma (mean Ed^2 + mean Es^2), a scalar (DxMI, Alg. 1, step 2).

    Args:
        energy_data: [N], float32 or float64; bfloat16 and float16 are widened to float32.
        energy_sample: [M], likewise.
        gamma: weight of the squares, 1 throughout the paper.
    """
    return _gradients.call(_gradients.ENERGY, _widened(energy_data), _widened(energy_sample), gamma)


def update_velocity_var_(velocity_var: Tensor, sq_displacement: Tensor, decay: float) -> Tensor:
    """Adaptive velocity regularization, in place: decay v + (1 - decay) mean_B (DxMI, Alg. 1, step 5).

    Builds no graph: sq_displacement is a constant here even if it requires grad.

    Args:
        velocity_var: [T], float32 or float64; must not be expanded, since it is written to.
        sq_displacement: [T, B], of the same dtype.
        decay: decay in [0, 1].

    Returns:
        velocity_var.
    """
    _gradients.refuse_gradients("update_velocity_var_", velocity_var=velocity_var, decay=decay)
    try:
        with torch.no_grad():
            _ops.update_velocity_var_(velocity_var, sq_displacement, decay)
    except RuntimeError as error:
        _gradients.refuse_type("update_velocity_var_", error)
        raise
    if not torch.compiler.is_compiling():  # torch.compile counts the write itself
        torch.autograd.graph.increment_version(velocity_var)
    return velocity_var


# --- helpers -----------------------------------------------------------------------------------------


def _widened(rows: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    low = isinstance(rows, Tensor) and rows.dtype in (torch.bfloat16, torch.float16)
    return rows.to(dtype) if low else rows


def _sizes(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape as integers; empty if it is none."""
    if torch.compiler.is_compiling():  # where sizes may be symbolic
        return tuple(shape)
    try:
        return tuple(map(operator.index, shape))
    except TypeError:
        return ()


def _check_key(op: str, key: Tensor) -> None:
    if not isinstance(key, Tensor):
        raise TypeError(f"dxmi_ext.ops.{op}: key must be a tensor from noise_key, got {type(key).__name__}")
    if key.dtype != torch.int64 or key.shape != (2,):
        raise ValueError(
            f"dxmi_ext.ops.{op}: key must be int64 [2] from noise_key, got {key.dtype} {list(key.shape)}"
        )
