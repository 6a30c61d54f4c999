"""The experiment ``fashion-mnist``: images on CPU cores. Imports ``reproduce.experiments``."""

from __future__ import annotations

from typing import Any

from dxmi_ext.reproduce.experiments import Experiment, Row


def _chain(name: str, label: str, **settings: Any) -> Row:
    row = f"{name}-10k" if "evaluate_n" in settings else name
    return Row(row, f"the base, {label}", settings, recipe="fashion-mnist-t10", chain=name, seeds=1)


def _fashion(name: str, label: str, steps: int, seeds: int | None = None, **settings: Any) -> Row:
    settings = {"precision": "bfloat16", "compile": True, "steps": steps} | settings
    recipe = "fashion-mnist-t10" if steps == 10 else "fashion-mnist-t4"
    return Row(name, f"{label}, T = {steps}", settings, recipe=recipe, seeds=seeds)


_NO_TAU: dict[str, Any] = {"tau_entropy": 0.0, "tau_velocity": 0.0}
_ANY: dict[str, Any] = {"lengths": "2,4,10", "iterations": 3000, "rho": 5.0, "adam_beta2": 0.99}
_ANY |= {"td_lambda": 0.9, "expected_cost": True}
_MORE_TAU: dict[str, Any] = {"tau_entropy": 0.1, "tau_velocity": 0.01}
_FLOAT32: dict[str, Any] = {"precision": "float32", "compile": False}
_UNTIMED = {"time_cost": "none"} | _FLOAT32
_LONG: dict[str, Any] = {"iterations": 4800, "precision": "float32"}
_ANY_LONG = _ANY | _LONG | {"compile": False}


FASHION_MNIST = Experiment(
    "fashion-mnist",
    "Fashion-MNIST on CPU cores",
    [
        _chain("edm-ancestral-1000", "ancestral, 1,000 evaluations"),
        _chain("edm-ancestral-100", "ancestral, 100 evaluations"),
        _chain("heun-40", "Heun, 79 evaluations"),
        _chain("heun-18", "Heun, 35 evaluations"),
        _chain("heun-18", "Heun, 35 evaluations, n = 10,000", evaluate_n=10_000),
        _chain("dpmpp-10", "DPM-Solver++ 2M, 10 evaluations"),
        _chain("heun-5", "Heun, 9 evaluations"),
        _fashion("start-t10", "the start of DxMI", 10, seeds=1, iterations=0),
        _fashion("dxmi-t10", "DxMI", 10),
        _fashion("dxmi-t10-tau0", "DxMI, tau = 0", 10, **_NO_TAU),
        _fashion("dxmi-t10-tau.1", "DxMI, tau = 0.1", 10, seeds=1, **_MORE_TAU),
        _chain("dpmpp-4", "DPM-Solver++ 2M, 4 evaluations"),
        _chain("heun-2", "Heun, 3 evaluations"),
        _fashion("start-t4", "the start of DxMI", 4, seeds=1, iterations=0),
        _fashion("dxmi-t4", "DxMI", 4),
        _fashion("dxmi-t4-tau0", "DxMI, tau = 0", 4, **_NO_TAU),
        _fashion("dxmi-t4-tau.1", "DxMI, tau = 0.1, in float32", 4, seeds=1, **_MORE_TAU, **_FLOAT32),
        _fashion("dxmi-t4-long", "DxMI, 4,800 iterations in float32", 4, seeds=1, **_LONG),
        _fashion("dxmi-t2", "DxMI", 2, seeds=1),
        _fashion("dxmi-any", "DxMI, one network for T = 2, 4 and 10", 4, seeds=1, **_ANY),
        _fashion("dxmi-any-long", "DxMI, one network, 4,800 iterations in float32", 4, seeds=1, **_ANY_LONG),
        _fashion("dxmi-t4-linear", "DxMI, linear time cost", 4, seeds=1, time_cost="linear"),
        _fashion("dxmi-t4-untimed", "DxMI, no time cost, in float32", 4, seeds=1, **_UNTIMED),
    ],
    columns={
        "fd_efflite0_2500": "FD",
        "fd_efflite0_2500_floor": "FD of test images",
        "fd_efflite0_2500_test": "FD to test images",
        "precision_efflite0_2500": "precision",
        "recall_efflite0_2500": "recall",
        "fd_classifier_2500": "FD, classifier",
        "fd_efflite0_2500_t2": "FD with T = 2",
        "fd_efflite0_2500_t10": "FD with T = 10",
        "fd_efflite0_10k": "FD, n = 10,000",
    },
    notes="""\
FD: Frechet distance between features of EfficientNet-lite0, of 2,500 samples and 2,500 training images (not
FID) or 2,500 test images; also for the features of a small classifier, and with 10,000 of each. With so few
images, the FD of the test images themselves is above 0. The base, from which DxMI starts, ships with the
package; its pretraining took 3.2 million images. DxMI runs in bfloat16, unless its row names float32.""",
    seeds=3,
)
