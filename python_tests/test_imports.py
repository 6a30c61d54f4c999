"""What modules may import, from their source and in fresh processes."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dxmi_ext

TRAIN_EXTRA = ("yaml", "sklearn", "matplotlib", "tensorboard", "safetensors", "tqdm")
REFUSED = ("yaml", "sklearn", "matplotlib", "tensorboard", "diffusers", "huggingface_hub")
REFUSED += ("PIL", "torchvision", "timm", "scipy")

PACKAGE = Path(dxmi_ext.__path__[0])
# From the lowest layer to the highest; a layer may import itself and those below.
LAYERS = (
    "_native",
    "_gradients",
    "_shapes",
    "ops",
    "engine",
    "method",
    "training",
    "pipeline",
    "tasks",
    "two_d",
    "images",
    "anomaly",
    "energies",
    "hub",
    "reproduce",
    "commands",
    "cli",
    "__main__",
)
# The same within layers; modules that are not listed are above those that are.
WITHIN = {
    "engine": (
        "errors",
        "arguments",
        "settings",
        "run_settings",
        "compute",
        "learning",
        "storage",
        "output",
        "runs",
        "run",
        "course",
    ),
    "images": ("data", "networks", "metrics"),
    "anomaly": ("data", "features", "detectors", "scores"),
}
# These require other libraries, from whose classes they inherit.
ADAPTERS = ("dxmi_ext.pipeline", "dxmi_ext.anomaly.anomalib", "dxmi_ext.anomaly.anomalib_parts")


REFUSE = f"""
import sys
for name in {REFUSED}:
    sys.modules[name] = None
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout[-2000:]
    return done.stdout


def modules() -> Iterator[tuple[str, Path]]:
    """All modules except the package itself, which imports its public names lazily."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if name := ".".join(("dxmi_ext", *(part for part in parts if part != "__init__")))[9:]:
            yield name, path


def imported(path: Path) -> Iterator[str]:
    """The modules of ``dxmi_ext`` that a file imports anywhere, without the prefix ``dxmi_ext.``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        yield from (name.removeprefix("dxmi_ext.") for name in names if name.startswith("dxmi_ext."))


def height(name: str) -> tuple[int, int]:
    """The position of a module: its layer, and its place within that."""
    layer, part = [*name.split("."), ""][:2]
    order = WITHIN.get(layer, ())
    return LAYERS.index(layer), order.index(part) if part in order else len(order)


def test_imports_run_one_way() -> None:
    """No module imports one above it, among the layers and within them, and there are no cycles, wherever the
    import stands."""
    homes, edges = dict(modules()), dict[str, set[str]]()
    against = []
    for name, path in homes.items():
        for target in imported(path):
            while target and target not in homes:
                target = target.rpartition(".")[0]  # a name in a module
            if not target:
                continue  # __version__
            edges.setdefault(name, set()).add(target)
            if height(target) > height(name):
                against.append(f"{name} imports {target}")
    assert not against
    list(graphlib.TopologicalSorter(edges).static_order())  # raises an error if there is a cycle


def test_public_names_are_there() -> None:
    for name in dxmi_ext.__all__:
        assert getattr(dxmi_ext, name).__name__.rpartition(".")[2] == name


def test_ops_load_nothing_but_torch_and_numpy() -> None:
    """Besides the modules that these load themselves."""
    code = """
import sys, numpy, torch
before = set(sys.modules)
import dxmi_ext.ops
loaded = {name.partition(".")[0] for name in sys.modules.keys() - before}
print(*(loaded - sys.stdlib_module_names - {"dxmi_ext", "torch", "numpy"}))
"""
    assert run(code).split() == []


def test_training_needs_no_library_of_config_metrics_or_images() -> None:
    names = [f"dxmi_ext.{name}" for name, _ in modules() if f"dxmi_ext.{name}" not in ADAPTERS]
    code = f"""
{REFUSE}
import importlib
for name in {names}:
    importlib.import_module(name)
"""
    run(code)


def test_every_test_is_collected_without_them() -> None:
    """Without these libraries, a test module that fails to import would prevent all others from running."""
    folder = Path(__file__).parent
    run(f"""
{REFUSE}
import pytest
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", {str(folder)!r}]))
""")


def test_command_line_without_the_train_extra() -> None:
    """`dxmi info` works; `dxmi train` names what to install."""
    code = f"""
import sys
for name in {TRAIN_EXTRA}:
    sys.modules[name] = None
from dxmi_ext import cli
assert cli.main(["info"]) == 0
assert cli.main(["train", "8gaussians"]) == 2
"""
    assert "CPU kernels" in run(code)
