"""Invalid input raises an error that names the op and the argument; it never crashes or passes silently."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cases import CONSTANT, OPERATORS, T, arguments, call, recorded_calls
from dxmi_ext import _native, ops

REFUSALS = (TypeError, ValueError, RuntimeError)


def _filled(value: float) -> Callable[[Tensor], Tensor]:
    """The tensor with one invalid value, at index 1, which is the step of some row."""
    return lambda x: x.index_fill(0, torch.tensor([1]), value)


# Ways to make a valid argument invalid.
SPOIL: dict[str, Callable[[Any], Any]] = {
    "none": lambda x: None,
    "list": lambda x: x.tolist(),
    "text": lambda x: "text",
    "fraction": lambda x: 1.5,
    "scalar": lambda x: x.sum(),
    "extra_dim": lambda x: x[None],
    "longer": lambda x: torch.cat([x, x[-1:]]),
    "shorter": lambda x: x[:-1],
    "wider": lambda x: torch.cat([x, x[:, -1:]], dim=1),
    "empty": lambda x: x[..., :0],
    "int32": lambda x: x.to(torch.int32),
    "int64": lambda x: x.to(torch.int64),
    "float32": lambda x: x.to(torch.float32),
    "float64": lambda x: x.to(torch.float64),
    "bfloat16": lambda x: x.to(torch.bfloat16),
    "complex64": lambda x: x.to(torch.complex64),
    "meta": lambda x: x.to("meta"),
    "negative": _filled(-1),
    "zero": _filled(0),
    "nan": _filled(torch.nan),
    "too_large": _filled(T),
    "below": lambda x: -1,
    "above": lambda x: T + 1,
    "wraps": lambda x: 2**32 - 1,
    "expanded": lambda x: x[:1].expand_as(x),
}
VALUES = {"negative", "zero", "nan", "too_large"}  # invalid values of tensors
FIRST_TABLE = "none extra_dim float64 int64 meta"  # its length is T
TABLE = f"{FIRST_TABLE} longer shorter"
ROWS = "list extra_dim int64 meta"
TIMESTEP = "list extra_dim longer shorter int32 float32 meta negative too_large"
KEY = "none list extra_dim longer shorter int32 float32 meta"
VARIANCE = f"{TABLE} zero negative nan"
BAD: dict[str, dict[str, str]] = {  # op -> argument -> names in SPOIL
    "sampler_step": {
        "sample": "none list scalar int64 complex64 empty",
        "model_output": "none longer wider extra_dim float64 bfloat16 meta",
        "timestep": TIMESTEP,
        "sample_coef": FIRST_TABLE,
        "output_coef": TABLE,
        "log_std": TABLE,
        "key": KEY,
        "sample_offset": "text fraction below wraps",
    },
    "transition_log_prob": {
        "next_sample": "none list scalar int64 complex64 empty",
        "sample": "none longer wider extra_dim float64 bfloat16 meta",
        "model_output": "none longer wider extra_dim float64 bfloat16 meta",
        "timestep": TIMESTEP,
        "sample_coef": FIRST_TABLE,
        "output_coef": TABLE,
        "log_std": TABLE,
    },
    "running_cost": {
        "sq_displacement": f"{ROWS} scalar complex64 bfloat16",
        "timestep": TIMESTEP,
        "log_std": FIRST_TABLE,
        "velocity_var": VARIANCE,
        "tau_entropy": "text none",
        "tau_velocity": "text none",
        "skip_last": "text fraction below above",
    },
    "td_target": {
        "next_value": "list extra_dim longer float64 int64 complex64 meta",
        "sq_displacement": ROWS,
        "timestep": TIMESTEP,
        "log_std": FIRST_TABLE,
        "velocity_var": VARIANCE,
        "time_cost": TABLE,
        "tau_entropy": "text none",
        "tau_velocity": "text none",
        "skip_last": "text fraction below above",
    },
    "energy_loss": {
        "energy_data": "none list scalar extra_dim int64 complex64 empty",
        "energy_sample": "none list scalar extra_dim float64 int64 complex64 empty meta",
        "gamma": "text none",
    },
    "update_velocity_var_": {
        "velocity_var": "none list scalar extra_dim int64 bfloat16 expanded",
        "sq_displacement": "none list extra_dim longer shorter empty float64 int64 meta",
        "decay": "text none below above",
    },
    "next_key": {"key": "none list extra_dim longer shorter int32 float32"},
    "normal": {
        "key": "none list extra_dim longer shorter int32 float32",
        "sample_offset": "text fraction below wraps",
    },
}


def refuses(op: str, argument: str, function: Callable[[], Any]) -> None:
    """The call raises an error whose message names the op and the argument."""
    with pytest.raises(REFUSALS) as caught:
        function()
    message = str(caught.value)
    assert re.search(rf"\bops\.{op}: .*\b{argument}\b", message), message


@pytest.mark.parametrize(
    ("op", "argument", "how"),
    [(op, name, how) for op, table in BAD.items() for name, hows in table.items() for how in hows.split()],
)
def test_bad_argument(op: str, argument: str, how: str, device: torch.device) -> None:
    if device.type == "cuda" and how in VALUES:
        pytest.skip("values are not read on the host: test_cuda.py")
    args = arguments(op, device=device)
    refuses(op, argument, lambda: call(op, args | {argument: SPOIL[how](args[argument])}))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "argument"), [(op, name) for op, table in BAD.items() for name in table if "meta" in table[name]]
)
def test_argument_on_another_device(op: str, argument: str) -> None:
    args = arguments(op, device="cuda")
    refuses(op, argument, lambda: call(op, args | {argument: args[argument].cpu()}))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("timestep", -1),
        ("timestep", 2**32),
        ("timestep", "text"),
        ("shape", ()),
        ("shape", (-1, 3)),
        ("shape", (2.5, 3)),
        ("shape", 5),
        ("shape", ("a",)),
        ("dtype", torch.int64),
    ],
)
def test_bad_argument_of_normal(argument: str, value: Any) -> None:
    refuses("normal", argument, lambda: ops.normal(**arguments("normal") | {argument: value}))


@pytest.mark.parametrize(("op", "argument"), [(op, name) for op, names in CONSTANT.items() for name in names])
def test_an_argument_without_gradient_must_not_require_one(
    op: str, argument: str, device: torch.device
) -> None:
    """Also compiled and under torch.func; with grad mode off, no gradient is expected."""
    args = arguments(op, device=device)
    value = torch.as_tensor(args[argument], dtype=torch.float32, device=device)
    learnable = args | {argument: torch.nn.Parameter(value)}
    refuses(op, argument, lambda: call(op, learnable))
    refuses(op, argument, lambda: torch.compile(call, fullgraph=True, backend="eager")(op, learnable))
    grad = torch.func.grad(lambda x: call(op, args | {argument: x})[0].sum())
    refuses(op, argument, lambda: grad(value))
    with torch.no_grad():
        assert not call(op, learnable)[0].isnan().any()


def test_a_gradient_of_an_outer_level_of_func_is_not_lost() -> None:
    """At the inner level, gamma does not require grad."""
    args = arguments("energy_loss")

    def inner(gamma: Tensor, x: Tensor) -> Tensor:
        return x * ops.energy_loss(**args | {"gamma": 1 * gamma})

    outer = torch.func.grad(lambda gamma: torch.func.grad(inner, argnums=1)(gamma, torch.ones(())))
    refuses("energy_loss", "gamma", lambda: outer(torch.ones(())))


def test_numpy_integers_are_integers() -> None:
    key = ops.noise_key(np.int64(3))
    assert key.tolist() == [3, 0]
    torch.testing.assert_close(ops.normal(np.array([2, 3]), key), ops.normal((2, 3), key))


@pytest.mark.parametrize(
    ("op", "argument", "value", "says"),
    [
        ("sampler_step", "sample", 1, "sample must be a tensor, got int"),
        ("sampler_step", "sample_offset", 1.5, "sample_offset must be an integer, got float"),
        ("sampler_step", "sample_offset", 2**70, "sample_offset must be an integer, got one beyond 64 bits"),
        ("running_cost", "tau_entropy", "a", "tau_entropy must be a number, got str"),
        ("energy_loss", "gamma", None, "gamma must be a number, got None"),
        ("td_target", "time_cost", [1.0], "time_cost must be a tensor, got list"),
        ("update_velocity_var_", "decay", "a", "decay must be a number, got str"),
    ],
)
@pytest.mark.parametrize("grad", [True, False])
def test_an_argument_of_another_type(op: str, argument: str, value: Any, says: str, grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(TypeError) as caught:
        call(op, arguments(op) | {argument: value})
    assert str(caught.value) == f"dxmi_ext.ops.{op}: {says}"


@pytest.mark.parametrize("seed", ["text", 1.5, True, 2**64])
def test_bad_seed(seed: Any) -> None:
    refuses("noise_key", "seed", lambda: ops.noise_key(seed))


def test_bad_generator() -> None:
    refuses("noise_key", "generator", lambda: ops.noise_key(generator=3))  # type: ignore[arg-type]


def test_row_longer_than_the_noise_format(device: torch.device) -> None:
    args = arguments("sampler_step", (1, 1), device=device)
    long = {name: args[name].expand(1, 2**34 + 1) for name in ("sample", "model_output")}
    refuses("sampler_step", "sample", lambda: ops.sampler_step(**args | long))


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_operators_called_directly_check_every_tensor(operator: str) -> None:
    """The operators behind the functions, including backward operators, refuse any single invalid tensor."""
    function, args, kwargs = recorded_calls()[operator]
    for i, (parameter, value) in enumerate(zip(function._schema.arguments, args, strict=False)):
        if isinstance(value, Tensor):
            ways = {"complex64", "meta"}
            if parameter.name != "out":  # it may have any shape
                ways.add("extra_dim")
                if value.ndim and not parameter.name.startswith("energy_"):  # these may have any length
                    ways.add("shorter")
            for how in ways:
                spoilt = SPOIL[how](value)
                with pytest.raises(REFUSALS):
                    function(*args[:i], spoilt, *args[i + 1 :], **kwargs)
                    pytest.fail(f"{operator} took {parameter.name} spoilt by {how}")


@pytest.mark.skipif(not _native.cuda_status(), reason="the ops have CUDA kernels here")
@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_without_cuda_kernels_the_error_of_a_cuda_tensor_has_a_remedy(operator: str) -> None:
    """Called as by the dispatcher for CUDA tensors, which requires no device."""
    function, args, kwargs = recorded_calls()[operator]
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match=r"no kernels for CUDA tensors: .*CPU"):
        function.redispatch(cuda, *args, **kwargs)
