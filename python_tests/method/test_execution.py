"""Execution settings: what they change, and that they change nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor, nn

from dxmi_ext import ops
from dxmi_ext.engine.compute import execution
from dxmi_ext.engine.compute.execution import ExecutionSettings
from dxmi_ext.engine.compute.graphs import WARM_UP, Graphed
from dxmi_ext.engine.settings import ConfigError
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.method import schedules
from dxmi_ext.method.denoising import Pretrainer, uniform_levels
from dxmi_ext.method.networks import Networks
from dxmi_ext.method.sampler import GaussianSampler
from dxmi_ext.method.trainer import DxMITrainer
from dxmi_ext.two_d.networks import SamplerMLP, ValueMLP
from groups import groups

B, SHAPE, T, CLASSES = 4, (3, 8, 8), 3, 5
ITERATIONS = 4
SCHEDULE = schedules.variance_exploding(T, sigma_max=2.0, sigma_min=0.4)
LAST = torch.channels_last
EVERY = [
    {"precision": "bfloat16"},
    {"channels_last": True},
    {"compile": True},
    {"precision": "bfloat16", "channels_last": True, "compile": True},
]
ON_A_GPU = [changes for changes in EVERY if changes != {"compile": True}]  # compiling once is slow enough


class Denoiser(nn.Module):
    """(x, timestep, labels) -> like x."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.step, self.label = nn.Embedding(T, 8), nn.Embedding(CLASSES, 8)

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        h = self.first(x) + self.step(timestep)[:, :, None, None]
        if labels is not None:
            h = h + self.label(labels)[:, :, None, None]
        return self.last(nn.functional.silu(h))


class Energy(nn.Module):
    """(x, labels) -> [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        classes = self.last(nn.functional.silu(self.first(x)).mean((2, 3)))
        return classes[:, 0] if labels is None else classes.gather(1, labels[:, None])[:, 0]


class Value(nn.Module):
    """(x, timestep, labels) -> [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Embedding(T + 1, 3)
        self.energy = Energy()

    def forward(self, x: Tensor, timestep: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.energy(x + self.step(timestep)[:, :, None, None], labels)


@pytest.fixture(autouse=True)
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU, torch.compile traces and guards as usual, but compiles nothing."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(execution, "BACKEND", "eager")


def make_networks(seed: int = 0, separate: bool = False) -> Networks:
    torch.manual_seed(seed)
    sampler = GaussianSampler(Denoiser(), SCHEDULE, SHAPE)
    return Networks(sampler, Value(), Energy() if separate else None)


def make_trainer(settings: dict[str, Any], seed: int = 0, device: str = "cpu", **kinds: Any) -> DxMITrainer:
    networks = make_networks(seed, **kinds).to(device)
    return DxMITrainer(networks, **groups(**settings), iterations=ITERATIONS, seed=1)


def make_pretrainer(settings: ExecutionSettings | None = None) -> Pretrainer:
    sampler = make_networks().sampler
    settings = settings or ExecutionSettings()
    memory_format = execution.prepare(settings, sampler.network, data_shape=SHAPE)
    levels = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    return Pretrainer(
        sampler.network,
        levels,
        lr=1e-3,
        iterations=ITERATIONS,
        seed=1,
        execution=settings,
        memory_format=memory_format,
    )


def batch(iteration: int, device: str = "cpu") -> Tensor:
    return ops.normal((B, *SHAPE), ops.noise_key(100 + iteration, device=device))


def dtypes_seen(*networks: nn.Module) -> set[torch.dtype]:
    """A set that collects the output dtypes of the networks' convolutions."""
    seen: set[torch.dtype] = set()
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    return seen


def tensors(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


# --- precision ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["dxdp", "policy_gradient"])
def test_bfloat16_is_of_the_networks_alone(update: str) -> None:
    settings = dict(precision="bfloat16", sampler_update=update)
    trainer = make_trainer(settings, separate=True)
    wanted = make_trainer(settings | dict(precision="float32"), separate=True).step(batch(0))
    in_training = dtypes_seen(trainer.networks)
    metrics = trainer.step(batch(0))
    assert in_training == {torch.bfloat16}
    kept = [*tensors(trainer.state_dict() | {"tallies": {}}), *metrics.values()]
    assert {tensor.dtype for tensor in kept} <= {torch.float32, torch.int64}
    assert any(not torch.equal(metrics[key], wanted[key]) for key in wanted)
    torch.testing.assert_close(metrics, wanted, rtol=0.05, atol=0.05)
    in_evaluation = dtypes_seen(trainer.averaged)
    path = trainer.averaged.sampler.rollout(B, ops.noise_key(1))
    trainer.averaged.energy(path.samples[-1])
    assert in_evaluation == {torch.float32}


def test_bfloat16_is_refused_for_float64_weights() -> None:
    sampler = GaussianSampler(SamplerMLP(2, T, width=4, depth=1), SCHEDULE, (2,)).double()
    levels = uniform_levels(SCHEDULE.signal, SCHEDULE.noise)
    settings = ExecutionSettings(precision="bfloat16")
    with pytest.raises(ConfigError, match="precision must be float32 with float64 weights"):
        Pretrainer(sampler.network, levels, lr=1e-3, iterations=1, seed=0, execution=settings)


def test_bfloat16_pretraining() -> None:
    pretrainer = make_pretrainer(ExecutionSettings(precision="bfloat16"))
    seen = dtypes_seen(pretrainer.network)
    loss, wanted = pretrainer.step(batch(0))["loss"], make_pretrainer().step(batch(0))["loss"]
    assert seen == {torch.bfloat16} and loss.dtype == torch.float32 and loss != wanted
    torch.testing.assert_close(loss, wanted, rtol=0.01, atol=0)
    assert {p.dtype for p in pretrainer.network.parameters()} == {torch.float32}


def test_switches_of_cuda_are_put_back() -> None:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn

    def now() -> tuple[Any, ...]:
        return matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.benchmark

    before, cuda = now(), torch.device("cuda")
    with pytest.raises(KeyboardInterrupt), execution.running(ExecutionSettings(), cuda):
        assert now() == ("tf32", "tf32", True)
        raise KeyboardInterrupt
    with (
        torch.backends.cudnn.flags(deterministic=True),
        execution.running(ExecutionSettings(tf32=False), cuda),
    ):
        assert now() == ("ieee", "ieee", False)
    assert now() == before
    with execution.running(ExecutionSettings(), torch.device("cpu")):
        assert now() == before


# --- memory format -----------------------------------------------------------------------------------


def test_channels_last_reaches_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """All inputs and outputs of the ops have this format, although the data are contiguous."""
    formats = []

    def spied(op: Callable[..., Any], inputs: slice) -> Callable[..., Any]:
        def spy(*args: Any, **kwargs: Any) -> Any:
            result = op(*args, **kwargs)
            outputs = result[:1] if isinstance(result, tuple) else ()
            formats.extend(x.is_contiguous(memory_format=LAST) for x in (*args[inputs], *outputs))
            return result

        return spy

    monkeypatch.setattr(ops, "sampler_step", spied(ops.sampler_step, slice(0, 2)))
    monkeypatch.setattr(ops, "transition_log_prob", spied(ops.transition_log_prob, slice(0, 3)))
    for update in ("dxdp", "policy_gradient"):
        settings = dict(sampler_update=update, channels_last=True)
        trainer, plain = (
            make_trainer(settings),
            make_trainer(settings | dict(channels_last=False)),
        )
        for name, network in (("sampler", trainer.sampler.network), ("value", trainer.value)):
            seen = [p.is_contiguous(memory_format=LAST) for p in network.parameters() if p.ndim == 4]
            assert seen and all(seen), name
        for iteration in range(2):
            found = len(formats)
            metrics = trainer.step(batch(iteration))
            assert len(formats) > found and all(formats[found:])
            torch.testing.assert_close(metrics, plain.step(batch(iteration)), rtol=1e-4, atol=1e-5)


def test_pretraining_prepares_its_network(monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_pretrainer(ExecutionSettings(channels_last=True))
    assert made.network.first.weight.is_contiguous(memory_format=LAST) and made.memory_format == LAST
    monkeypatch.setattr(execution, "BACKEND", "eager")
    assert make_pretrainer(ExecutionSettings(compile=True)).network._compiled_call_impl is not None


def test_channels_last_is_for_images() -> None:
    sampler = GaussianSampler(SamplerMLP(2, T, 8, 2), SCHEDULE, (2,))
    with pytest.raises(ConfigError, match=r"channels_last must be false unless data are images .* \[2\]"):
        DxMITrainer(
            Networks(sampler, ValueMLP(2, T, 8, 2)), **groups(channels_last=True), iterations=1, seed=0
        )


# --- torch.compile -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("separate", "labeled", "changes"),
    [
        (False, True, {}),
        (True, False, {"td_order": "shuffled", "td_redraw": True}),
        (True, True, {"sampler_update": "policy_gradient"}),
    ],
)
def test_compiled_networks_train_alike_and_once(
    separate: bool, labeled: bool, changes: dict[str, Any]
) -> None:
    """Nothing is compiled after the first iteration: frozen or not, with gradients or not, B or 2B rows."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = dict(compile=True, sampler_steps=T, **changes)
    trainer = make_trainer(settings, separate=separate)
    plain = make_trainer(settings | dict(compile=False), separate=separate)
    assert trainer.state_dict()["networks"].keys() == plain.state_dict()["networks"].keys()
    labels = torch.arange(B) % CLASSES
    for iteration in range(ITERATIONS):
        data = (batch(iteration), labels) if labeled else batch(iteration)
        torch.compiler.set_stance("fail_on_recompile" if iteration else "default")
        try:
            metrics = trainer.step(data)
        finally:
            torch.compiler.set_stance("default")
        torch.testing.assert_close(metrics, plain.step(data), rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 4


def test_value_guidance_through_compiled_networks() -> None:
    trainer, plain = make_trainer(dict(compile=True)), make_trainer(dict())
    timestep = torch.full((B,), 2)
    for networks, wanted in ((trainer.networks, plain.networks), (trainer.averaged, plain.averaged)):
        moved = networks.guide(0.3)(batch(0), timestep, None)
        torch.testing.assert_close(moved, wanted.guide(0.3)(batch(0), timestep, None))


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def backend(*_: Any) -> Any:
        raise RuntimeError("no working compiler\nand much more")

    monkeypatch.setattr(execution, "BACKEND", backend)
    with pytest.raises(
        ConfigError, match=r"compile must be false .* got true on cpu: .*no working compiler"
    ) as caught:
        make_trainer(dict(compile=True))
    assert "\n" not in str(caught.value)


# --- resuming ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", EVERY, ids=str)
def test_a_resumed_trainer_continues_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    """Through the files of a checkpoint, which do not store memory formats."""
    settings = changes
    straight = make_trainer(settings)
    for iteration in range(ITERATIONS):
        if iteration == 2:
            checkpoint.save(tmp_path, 2, straight.state_dict(), keep=1)
        straight.step(batch(iteration))
    resumed = make_trainer(settings, seed=1)  # other weights, to be overwritten
    resumed.load_state_dict(checkpoint.load(tmp_path / "step_00000002"))
    for iteration in range(2, ITERATIONS):
        resumed.step(batch(iteration))
    torch.testing.assert_close(resumed.state_dict(), straight.state_dict(), rtol=0, atol=0)


def test_a_graph_refuses_batches_of_another_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even batches of one row, which a copy would broadcast."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Mock)
    graphed = Graphed(Mock())
    graphed._calls, graphed._inputs = WARM_UP + 1, (torch.zeros(B, 2), None)
    graphed(torch.ones(B, 2), None)
    for inputs in ((torch.ones(1, 2), None), (torch.ones(B, 2), torch.ones(B))):
        with pytest.raises(ConfigError, match=r"CUDA graph must keep their shapes, \[\[4, 2\], None\], got"):
            graphed(*inputs)


# --- on a GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"tf32": False}, *ON_A_GPU], ids=str)
def test_training_does_not_wait_for_the_device(changes: dict[str, Any]) -> None:
    trainer = make_trainer(changes, device="cuda")
    data = batch(0, "cuda")
    trainer.step(data)
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step(data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("changes", ON_A_GPU, ids=str)
def test_training_in_a_graph_equals_training_without(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    settings = changes
    plain = make_trainer(settings, device="cuda")
    graphed = make_trainer(settings | dict(cuda_graph=True), device="cuda")
    for iteration in range(8):
        data = batch(iteration, "cuda")
        found, wanted = (trainer.step(data) for trainer in (graphed, plain))
        torch.testing.assert_close(copy.copy(found), wanted, rtol=1e-3, atol=1e-4)
