"""A user's own target: ``package.module:function``, [N, D] -> [N].

Imports torch, ``dxmi_ext.ops``, the engine and ``energies.targets``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dxmi_ext import ops
from dxmi_ext.energies.targets import Energy, Target
from dxmi_ext.engine.settings import ConfigError

_PROBE = 16  # points at which an energy is tested
_TOLERANCE = 0.01  # of a row's energy in batches of other sizes, relative to the largest


def load(name: str, dim: int, particles: int | None, scale: float) -> tuple[Target, str]:
    """The target with a given name, and a hash of its module's source.

    Args:
        name: ``package.module:function``; the module is looked up in the current folder first.
        dim: D.
        particles: number of particles, see `Target`.
        scale: standard deviation of the points at which the energy is tested.

    Raises:
        ConfigError: the function does not exist, or it is not a differentiable energy.
    """
    module_name, colon, attribute = name.partition(":")
    is_path = module_name.endswith(".py")
    dotted = module_name.removesuffix(".py").replace("/", ".")
    is_name = bool(colon and attribute) and all(part.isidentifier() for part in dotted.split("."))
    if is_path or "/" in module_name or not is_name:
        hint = f"; did you mean {dotted}:{attribute}?" if is_path and is_name else ""
        raise ConfigError(f"target must be package.module:function, got {name!r}{hint}")
    module, source = _import(name, module_name)
    function = getattr(module, attribute, None)
    if function is None:
        raise ConfigError(f"target must name a function of {module.__file__}, got {name!r}: no {attribute}")
    if not callable(function):
        raise ConfigError(
            f"target must name a function, got {name!r}, an object of type {type(function).__name__}"
        )
    target = Target(name, dim, _called(name, function), particles)
    _try(target, scale)
    return target, hashlib.blake2b(source, digest_size=16).hexdigest()


def _import(name: str, module_name: str) -> tuple[ModuleType, bytes]:
    """The module and its source; a module in the current folder is executed again from its source."""
    try:
        with _current_folder_first():
            path = Path.cwd().joinpath(*module_name.split("."))
            for file in (path.with_suffix(".py"), path / "__init__.py"):
                if file.is_file():
                    return _execute(module_name, file)
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            raise ConfigError(
                f"target must name a module in the current folder or an installed one, got {name!r}: "
                f"no module {error.name!r} in {Path.cwd()}"
            ) from error
        raise ConfigError(f"target: {name!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:  # a script may exit
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"target: {name!r} cannot be imported: {what}") from error
    origin = getattr(module, "__file__", None) or ""  # built-in modules have none
    if not origin.endswith(".py"):
        raise ConfigError(f"target must name a module with Python source, got {name!r}")
    return module, Path(origin).read_bytes()


def _execute(module_name: str, file: Path) -> tuple[ModuleType, bytes]:
    source = file.read_bytes()
    if "." in module_name:
        importlib.import_module(module_name.rpartition(".")[0])  # for imports relative to its package
    spec = importlib.util.spec_from_file_location(module_name, file)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(module_name)
    sys.modules[module_name] = module  # dataclasses look their module up
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), module.__dict__)
    finally:
        del sys.modules[module_name]  # another start may find another source, or none
        if before is not None:
            sys.modules[module_name] = before
    return module, source


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(folder)
        if folder not in sys.path:
            sys.path.append(folder)  # for imports within functions


def _called(name: str, function: Any) -> Energy:
    """The function with a check of its result at every call."""

    def energy(x: Tensor) -> Tensor:
        try:
            found = function(x)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise ConfigError(f"target: {name} failed on a tensor {[*x.shape]}: {what}") from error
        if not isinstance(found, Tensor) or found.shape != x.shape[:1]:
            got = [*found.shape] if isinstance(found, Tensor) else type(found).__name__
            raise ConfigError(f"target: {name} must map {[*x.shape]} to [{len(x)}] energies, got {got}")
        if not found.is_floating_point():
            raise ConfigError(f"target: {name} must give floating-point energies, got {found.dtype}")
        return found if found.dtype == torch.float64 else found.to(x.dtype)

    return energy


def _try(target: Target, scale: float) -> None:
    """Raises a ConfigError if the energy or its gradient is not finite, or a row depends on others."""
    y = scale * ops.normal((_PROBE, target.free), ops.noise_key(0))
    with torch.enable_grad():
        x = target.lift(y).requires_grad_()
        energies = target.energy(x)
        if not energies.isfinite().all():
            odd = next(float(e) for e in energies.detach() if not e.isfinite())
            raise ConfigError(
                f"target: {target.name} must give finite energies, got {odd} at a normal point of standard "
                f"deviation scale={scale:g}"
            )
        values, alone = energies.detach(), float(target.energy(x[:1]).detach())
        if not abs(alone - values[0]) <= _TOLERANCE * values.abs().max():
            raise ConfigError(
                f"target: {target.name} must give the same energy for a row in batches of any size, got "
                f"{alone:g} alone and {float(values[0]):g} among {_PROBE} rows"
            )
        if not energies.requires_grad:
            raise ConfigError(
                f"target: {target.name} must be differentiable by torch, got energies without a gradient"
            )
        (slope,) = torch.autograd.grad(energies.sum(), x, allow_unused=True)
    if slope is None or not slope.isfinite().all():
        raise ConfigError(f"target: {target.name} must have a finite gradient, got {_slope(slope)}")


def _slope(slope: Tensor | None) -> str:
    return "none" if slope is None else f"{int((~slope.isfinite()).sum())} values that are not finite"
