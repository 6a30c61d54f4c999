"""Values and gradients of every op against the float64 reference, over dtypes, shapes and memory layouts.

An output may differ from the float64 result of the same inputs by one rounding to its own dtype, plus ERROR
of the arithmetic's dtype relative to the largest value. For bfloat16 and float16 that is less than the error
of torch itself, which rounds after every operation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    DIFFERENTIABLE,
    LAYOUTS,
    PARAMETERS,
    TWICE,
    T,
    arguments,
    call,
    expected,
    given_twice,
    with_leaves,
)
from dxmi_ext import ops

DEVICES = ("cpu", "emulated", "cuda")

ERROR = {torch.float32: 2e-6, torch.float64: 1e-13}
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SAMPLE_OPS = ["sampler_step", "transition_log_prob"]
SAMPLES = {"next_sample", "sample", "model_output"}


def assert_accurate(actual: Tensor, exact: Tensor, what: str) -> None:
    """`actual` is within one rounding of the float64 `exact` plus ERROR x max(1, max |exact|)."""
    assert actual.shape == exact.shape, what
    if actual.numel():
        assert actual.isfinite().all(), what
        rounding = torch.finfo(actual.dtype).eps / 2 * exact.abs()
        excess = (((actual.double() - exact).abs() - rounding).max() / exact.abs().max().clamp(min=1)).item()
        allowed = ERROR[torch.float64 if actual.dtype == torch.float64 else torch.float32]
        assert excess <= allowed, f"{what}: off by one rounding and {excess:.2e}, allowed are {allowed:.0e}"


def cotangents(outputs: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Gradients of the outputs: an expanded scalar ("ones", as from sum()), or random in one of LAYOUTS."""
    if kind == "ones":
        return [y.new_ones(()).expand_as(y) for y in outputs]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=generator).to(y) for y in outputs]
    return [LAYOUTS[kind](w) if w.ndim > 1 else w for w in weights]


def assert_matches_reference(
    op: str, args: dict[str, Any], used: Sequence[int] | None = None, kind: str = "contiguous"
) -> None:
    """All outputs agree with the reference, and so do the gradients of the outputs in `used` (None: all)."""
    names = DIFFERENTIABLE.get(op, ())
    args, leaves = with_leaves(args, names)
    wide_args, wide_leaves = with_leaves(args, names, torch.float64)
    outputs, exact_outputs = call(op, args), expected(op, wide_args)
    for i, (actual, exact) in enumerate(zip(outputs, exact_outputs, strict=True)):
        assert_accurate(actual.detach(), exact.detach(), f"{op}, output {i}")
    if leaves:
        used = range(len(outputs)) if used is None else used
        weights = cotangents([outputs[i] for i in used], kind)
        wide_weights = [w.double() for w in weights]
        gradients = torch.autograd.grad(
            [outputs[i] for i in used], list(leaves.values()), weights, materialize_grads=True
        )
        exact_gradients = torch.autograd.grad(
            [exact_outputs[i] for i in used], list(wide_leaves.values()), wide_weights, materialize_grads=True
        )
        for (name, leaf), actual, exact in zip(leaves.items(), gradients, exact_gradients, strict=True):
            assert actual.dtype == leaf.dtype
            assert_accurate(actual, exact, f"{op}, gradient of {name}")


@pytest.mark.parametrize("op", PARAMETERS)
def test_signature(op: str) -> None:
    """Names, order and keyword-only parameters are those of the contract."""
    signature = inspect.signature(getattr(ops, op)).parameters.values()
    first = next((i for i, p in enumerate(signature) if p.kind is p.KEYWORD_ONLY), len(signature))
    names = [p.name for p in signature]
    assert names[:first] + ["*"] * (first < len(names)) + names[first:] == PARAMETERS[op].split()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "shape", [(1, 1), (0, 3), (0, 20_003), (4,), (1, 129), (9001, 2), (5, 3, 7, 5), (2, 1, 3, 2, 3)]
)
@pytest.mark.parametrize("op", SAMPLE_OPS)
def test_sample_ops(op: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    assert_matches_reference(op, arguments(op, shape, dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", SAMPLE_OPS)
def test_sample_ops_on_long_rows(op: str, dtype: torch.dtype, device: torch.device) -> None:
    assert_matches_reference(op, arguments(op, (3, 200_003), dtype, device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layout", "shape"),
    # Whether channels consist of whole units of the CUDA kernels, in one block or several.
    [
        *((layout, (3, 23, 31)) for layout in LAYOUTS),
        *(("channels_last", s) for s in [(3, 8, 8), (3, 48, 64)]),
    ],
)
@pytest.mark.parametrize("op", SAMPLE_OPS)
def test_memory_layouts(
    op: str, layout: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """All samples in one layout; one in that layout and the others contiguous, and the other way round."""
    args = arguments(op, (3, *shape), dtype, device)
    samples = [name for name in args if name in SAMPLES]
    strided = {name: LAYOUTS[layout](args[name]) for name in samples}
    assert_matches_reference(op, args | strided, kind="channels_last")
    for name in samples:
        assert_matches_reference(op, args | {name: strided[name]}, kind="sliced")
        assert_matches_reference(op, args | strided | {name: args[name]}, kind="ones")


@pytest.mark.parametrize("op", [*SAMPLE_OPS, "running_cost", "td_target"])
def test_strided_rows_and_tables(op: str, device: torch.device) -> None:
    args = arguments(op, (9, 5), device=device)
    strided = {
        name: value.repeat_interleave(3)[::3]
        for name, value in args.items()
        if isinstance(value, Tensor) and value.ndim == 1 and name != "key"
    }
    assert_matches_reference(op, args | strided, kind="ones")


@pytest.mark.parametrize(
    ("shape", "memory_format"),
    [
        ((2, 3, 4, 5), torch.contiguous_format),
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 6), torch.channels_last_3d),
    ],
)
def test_next_sample_keeps_the_memory_format(
    shape: tuple[int, ...], memory_format: torch.memory_format, device: torch.device
) -> None:
    args = arguments("sampler_step", shape, device=device)
    for name in ("sample", "model_output"):  # whatever the format of the other
        sample = args["sample"].contiguous(memory_format=memory_format)
        other = args["model_output"] if name == "sample" else sample
        next_sample = ops.sampler_step(**args | {"sample": sample, "model_output": other}).next_sample
        assert next_sample.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("kind", ["contiguous", "ones", "expanded_rows"])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)])
def test_gradients_of_some_outputs(used: tuple[int, ...], kind: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.float16):
        args = arguments("sampler_step", (6, 4, 3), dtype, device)
        assert_matches_reference("sampler_step", args, used, kind)


@pytest.mark.parametrize("op", SAMPLE_OPS)
def test_gradient_of_log_std_gathers_the_rows_of_each_step(op: str, device: torch.device) -> None:
    """The gradient is exactly zero at steps without rows; at the step of all rows, it is their sum."""
    for step in range(T):
        args = arguments(op, (33, 5), device=device)
        args["timestep"] = torch.full_like(args["timestep"], step)
        assert_matches_reference(op, args)
        args, leaves = with_leaves(args, ["log_std"])
        (gradient,) = torch.autograd.grad([y.sum() for y in call(op, args)], leaves["log_std"])
        assert gradient.nonzero().flatten().tolist() == [step]


def test_step_without_noise(device: torch.device) -> None:
    """log_std = -inf: next_sample is the mean and its gradients are finite; the log-density is infinite."""
    args = arguments("sampler_step", (6, 5), device=device)
    args["log_std"] = torch.full_like(args["log_std"], -torch.inf)
    args, leaves = with_leaves(args, DIFFERENTIABLE["sampler_step"])
    output, (mean, _, sq_displacement) = ops.sampler_step(**args), expected("sampler_step", args)
    assert_accurate(output.next_sample, mean, "next_sample")
    assert_accurate(output.sq_displacement, sq_displacement, "sq_displacement")
    assert (output.log_prob == torch.inf).all()
    value = output.next_sample.sum() + output.sq_displacement.sum()
    gradients = torch.autograd.grad(value, list(leaves.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [4, 5, 37, 1100, 9001])
def test_infinite_coefficients(dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sums are infinite, not NaN: the padding of rows, where 0 times infinity is NaN, does not enter."""
    args = arguments("sampler_step", (T, dim), dtype, device)
    args |= {"log_std": torch.full_like(args["log_std"], torch.inf).requires_grad_()}
    sq_displacement = ops.sampler_step(**args).sq_displacement
    assert (sq_displacement == torch.inf).all()
    assert (torch.autograd.grad(sq_displacement.sum(), args["log_std"])[0] == torch.inf).all()

    args = arguments("transition_log_prob", (T, dim), dtype, device)
    args |= {"output_coef": torch.full_like(args["output_coef"], torch.inf)}
    log_prob = ops.transition_log_prob(**args | {"log_std": args["log_std"].requires_grad_()})
    assert (log_prob == -torch.inf).all()
    assert (torch.autograd.grad(log_prob.sum(), args["log_std"])[0] == torch.inf).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_half_value_survives_a_step(dtype: torch.dtype, device: torch.device) -> None:
    """With a = 1 and no noise, all 65,536 bit patterns survive, including subnormal, infinite and NaN."""
    args = arguments("sampler_step", (8, 8192), dtype, device)
    args["sample"] = torch.arange(2**16, device=device).to(torch.int16).view(dtype).view(8, 8192)
    tables = {"sample_coef": 1.0, "output_coef": 0.0, "log_std": -torch.inf}
    args |= {name: torch.full_like(args[name], value) for name, value in tables.items()}
    next_sample = ops.sampler_step(**args).next_sample
    torch.testing.assert_close(next_sample, args["sample"], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", FLOATS)
def test_non_finite_samples_stay_in_their_rows(dtype: torch.dtype, device: torch.device) -> None:
    args = arguments("sampler_step", (7, 37), dtype, device)
    clean = ops.sampler_step(**args)
    args["sample"][2, 5], args["sample"][4, 36] = torch.nan, torch.inf
    spoilt, others = ops.sampler_step(**args), [0, 1, 3, 5, 6]
    assert all(torch.equal(s[others], c[others]) for s, c in zip(spoilt, clean, strict=True))
    assert spoilt.next_sample[2, 5].isnan() and spoilt.sq_displacement[2].isnan()
    assert spoilt.next_sample[4, 36].isinf() and not spoilt.sq_displacement[4].isfinite()


@pytest.mark.parametrize("op", TWICE)
def test_one_tensor_as_any_two_arguments(op: str, device: torch.device) -> None:
    for args in given_twice(op, device):
        assert_matches_reference(op, args)


@pytest.mark.parametrize(
    ("op", "name", "change"),
    [
        ("sampler_step", "key", lambda key: key.copy_(ops.next_key(key))),
        ("sampler_step", "log_std", lambda log_std: log_std.detach().add_(1)),
        ("running_cost", "velocity_var", lambda v: ops.update_velocity_var_(v, v.new_ones(T, 3), 0.5)),
    ],
)
def test_input_changed_in_place_before_backward(
    op: str, name: str, change: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Backward uses the inputs of forward or raises an error; a changed key does not replay other noise."""
    args, leaves = with_leaves(arguments(op, device=device), DIFFERENTIABLE[op])
    inputs = list(leaves.values())
    wanted = torch.autograd.grad([y.sum() for y in call(op, args)], inputs)
    outputs = call(op, args)
    change(args[name])
    try:
        gradients = torch.autograd.grad([y.sum() for y in outputs], inputs)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert all(torch.equal(g, w) for g, w in zip(gradients, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("skip_last", [0, 1, T])
@pytest.mark.parametrize("rows", [0, 1, 9001])
@pytest.mark.parametrize("op", ["running_cost", "td_target"])
def test_costs(op: str, rows: int, skip_last: int, dtype: torch.dtype, device: torch.device) -> None:
    assert_matches_reference(op, arguments(op, (rows,), dtype, device) | {"skip_last": skip_last})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_td_target_widens_next_value(dtype: torch.dtype, device: torch.device) -> None:
    args = arguments("td_target", (9,), dtype, device)
    assert ops.td_target(**args).dtype == torch.float32
    assert_matches_reference("td_target", args)


def test_td_target_has_no_graph(device: torch.device) -> None:
    args, _ = with_leaves(arguments("td_target", device=device), ["next_value", "sq_displacement", "log_std"])
    assert not ops.td_target(**args).requires_grad


def test_skipped_steps_cost_nothing_whatever_their_std(device: torch.device) -> None:
    args = arguments("running_cost", (8,), device=device)
    args["log_std"][-1] = -torch.inf
    args, leaves = with_leaves(args, DIFFERENTIABLE["running_cost"])
    cost, skipped = ops.running_cost(**args), args["timestep"] == T - 1
    assert (cost[skipped] == 0).all() and (cost[~skipped] != 0).all()
    by_row, by_step = torch.autograd.grad(cost.sum(), list(leaves.values()))
    assert (by_row[skipped] == 0).all() and by_step[-1] == 0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [1, 5, 4099])
def test_energy_loss(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments("energy_loss", (rows,), dtype, device)
    loss = ops.energy_loss(**args)
    assert loss.shape == () and loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_matches_reference("energy_loss", args)
    strided = {"energy_data": args["energy_data"].repeat_interleave(2)[::2]}
    expanded = {"energy_sample": args["energy_sample"][:1].expand(rows + 2)}
    assert_matches_reference("energy_loss", args | strided | expanded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded_rows"])
@pytest.mark.parametrize("rows", [1, 4099])
def test_update_velocity_var(rows: int, layout: str, dtype: torch.dtype, device: torch.device) -> None:
    args = arguments("update_velocity_var_", (rows,), dtype, device)
    args["sq_displacement"] = LAYOUTS[layout](args["sq_displacement"])
    exact = expected("update_velocity_var_", args)[0]
    between = torch.full((2 * T,), -1, dtype=dtype, device=device)
    between[::2] = args["velocity_var"]
    for velocity_var in (args["velocity_var"], between[::2]):
        assert ops.update_velocity_var_(**args | {"velocity_var": velocity_var}) is velocity_var
        assert_accurate(velocity_var, exact, "velocity_var")
    assert (between[1::2] == -1).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_update_velocity_var_of_views_of_one_tensor(compiled: bool, device: torch.device) -> None:
    """The means are those before the update, even if it overwrites sq_displacement."""
    update = ops.update_velocity_var_
    if compiled:
        update = torch.compile(update, fullgraph=True, backend="aot_eager")
    for part in (lambda buffer: buffer, lambda buffer: buffer[:, 0].expand(T, T)):
        buffer = torch.rand(T, T, generator=torch.Generator().manual_seed(0)).to(device)
        wanted = ops.update_velocity_var_(buffer[:, 0].clone(), part(buffer).clone(), 0.5)
        found = update(buffer[:, 0], part(buffer), 0.5)
        assert torch.equal(buffer[:, 0], wanted)
        if not compiled:  # torch.compile of torch 2.11 returns the whole buffer, whatever the function is
            assert torch.equal(found, wanted)


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", DIFFERENTIABLE)
@pytest.mark.parametrize("shape", [(3, 200_003), (4099, 33)])
def test_bits_do_not_depend_on_the_threads(
    op: str, shape: tuple[int, int], device: torch.device, set_threads: Callable[[int], None]
) -> None:
    results = []
    for threads in (1, 2, 2):
        set_threads(threads)
        args, leaves = with_leaves(arguments(op, shape, device=device), DIFFERENTIABLE[op])
        outputs = call(op, args)
        gradients = torch.autograd.grad(outputs, list(leaves.values()), cotangents(outputs, "sliced"))
        results.append([*outputs, *gradients])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize(
    "shape", [(37, 4099), (5, 3, 16, 16), (300, 2), (2, 1024), (2, 1028), (2, 8192), (2, 8196)]
)
def test_kernels_give_the_bits_of_the_cpu(shape: tuple[int, ...], device: torch.device) -> None:
    """All kernels give the same bits of next_sample, and row means within 1e-6."""
    found = ops.sampler_step(**arguments("sampler_step", shape, device=device))
    on_cpu = arguments("sampler_step", shape)
    offset = on_cpu.pop("sample_offset")
    wanted = ops.StepOutput(*torch.ops.dxmi_ext.sampler_step_fwd(*on_cpu.values(), offset))
    assert torch.equal(found.next_sample.cpu(), wanted.next_sample)
    for name in ("log_prob", "sq_displacement"):
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(wanted, name), rtol=1e-6, atol=1e-6)
