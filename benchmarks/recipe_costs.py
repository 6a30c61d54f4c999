"""The cost of an iteration of the image recipes, counted without running it.

The trainer's iteration runs on fake tensors, which have shapes but no values. Counted are the floating-point
operations of matrix products, convolutions and attention, and the peak bytes of all live tensors. These are
not measurements: the speed of a GPU and the workspaces of its libraries are unknown. A recipe takes minutes,
and memory for its weights.

    python benchmarks/recipe_costs.py [RECIPE ...]
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop, sdpa_flop

from dxmi_ext import tasks
from dxmi_ext.engine.runs import config
from dxmi_ext.engine.storage import checkpoint
from dxmi_ext.images import model
from dxmi_ext.images.settings import Config
from dxmi_ext.method.trainer import DxMITrainer

# Recipe -> shape of its data, classes.
DATA: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "cifar10-t10": ((3, 32, 32), None),
    "cifar10-edm-t4": ((3, 32, 32), None),
    "imagenet64-t10": ((3, 64, 64), 1000),
    "imagenet64-t4": ((3, 64, 64), 1000),
    "lsun-bedroom-t4": ((3, 256, 256), None),
}
RANKS = (1, 8)
_ATTENTION: dict[Any, Callable[..., int]] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda grad, q, k, v, *_, **__: sdpa_backward_flop(grad, q, k, v)
    ),
}


class LiveBytes(TorchDispatchMode):
    """The peak bytes of the tensors created within."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen = weakref.WeakSet[Any]()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if is_tensor(tensor)
        }
        for tensor in filter(is_tensor, tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage not in self._seen:
                self._seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return result

    def _freed(self, nbytes: int) -> None:
        self.now -= nbytes


def is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def costs(name: str) -> tuple[Config, int, list[int]]:
    """Settings, operations of an iteration over all rows, and bytes per rank for each number of ranks."""
    cfg = config.load(Config, tasks.find(name), ["device=cpu"])
    shape, classes = DATA[name]
    network, diffusion = model.network_of(cfg, shape, classes)
    networks = model.networks_of(cfg, network, shape, classes, diffusion)
    trainer = DxMITrainer(
        networks, cfg.algorithm, iterations=cfg.run.iterations, seed=0, execution=cfg.execution
    )

    def step(rows: int) -> tuple[int, int]:
        labels = None if classes is None else torch.zeros(rows, dtype=torch.int64)
        data = torch.zeros(rows, *shape)
        with LiveBytes() as live, FlopCounterMode(display=False, custom_mapping=_ATTENTION) as flops:
            trainer.step(data if labels is None else (data, labels))
        return flops.get_total_flops(), live.peak

    with FakeTensorMode(allow_non_fake_inputs=True):
        each, _ = step(1)  # also creates the optimizers' moments
        peaks = [step(cfg.run.batch_size // ranks)[1] for ranks in RANKS]
        state = checkpoint.nbytes(trainer.state_dict())
    return cfg, each * cfg.run.batch_size, [state + peak for peak in peaks]


def main() -> None:
    heads = ["recipe", "batch", "TFLOP an iteration", "EFLOP a run"]
    heads += ["GiB on 1 GPU" if ranks == 1 else f"GiB on each of {ranks} GPUs" for ranks in RANKS]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for name in sys.argv[1:] or DATA:
        cfg, flops, peaks = costs(name)
        cells = [f"`{name}`", str(cfg.run.batch_size), f"{flops / 1e12:.0f}"]
        cells += [f"{flops * cfg.run.iterations / 1e18:.1f}", *(f"{peak / 2**30:.1f}" for peak in peaks)]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
