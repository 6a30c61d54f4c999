"""Targets: log Z from grids, exact samples, particles, and errors in a user's own target."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from dxmi_ext import ops
from dxmi_ext.energies import custom, reference, targets
from dxmi_ext.energies.networks import TargetEnergy
from dxmi_ext.energies.targets import TARGETS
from dxmi_ext.engine.settings import ConfigError


@pytest.mark.parametrize(("name", "reach"), [("gmm9", 9.0), ("gmm25", 14.0), ("gmm40", 48.0)])
def test_mixtures_are_normalized(name: str, reach: float) -> None:
    line = torch.linspace(-reach, reach, 201, dtype=torch.float64)
    energies = TARGETS[name]().energy(torch.cartesian_prod(line, line))
    log_z = float(torch.logsumexp(-energies, 0)) + 2 * math.log(float(line[1] - line[0]))
    assert log_z == pytest.approx(0, abs=1e-3)


def test_many_wells_have_the_known_log_partition() -> None:
    assert TARGETS["manywell32"]().log_partition == pytest.approx(164.696, abs=2e-3)
    x = TARGETS["manywell32"]().draw(20_000, ops.noise_key(0), 0)  # type: ignore[misc]
    right = (x[:, 0::2] > 0).float().mean(0)
    line = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    density = (-(line**4 - 6 * line**2 - line / 2)).exp()
    share = float(density[line > 0].sum() / density.sum())
    assert (right - share).abs().max() < 4 * math.sqrt(share * (1 - share) / 20_000)
    assert float(x[:, 1::2].var()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("name", ["gmm9", "gmm25", "gmm40", "funnel10", "manywell32"])
def test_exact_samples_depend_on_key_and_global_row_alone(name: str) -> None:
    draw, key = TARGETS[name]().draw, ops.noise_key(3)
    assert draw is not None
    whole = draw(50, key, 0)
    assert whole.shape == (50, TARGETS[name]().dim) and whole.dtype == torch.float32
    assert torch.equal(torch.cat((draw(20, key, 0), draw(30, key, 20))), whole)


@pytest.mark.parametrize("name", ["gmm25", "funnel10"])
def test_mean_energy_of_exact_samples_is_the_entropy(name: str) -> None:
    """For targets with log Z = 0; the modes of the mixture are far apart."""
    target = TARGETS[name]()
    assert target.draw is not None
    entropy = {
        "gmm25": math.log(25) + math.log(2 * math.pi * math.e * 0.3),
        "funnel10": 5 * math.log(2 * math.pi * math.e) + math.log(3),  # E[x_0] = 0
    }[name]
    energies = target.energy(target.draw(40_000, ops.noise_key(1), 0).double())
    assert float(energies.mean()) == pytest.approx(entropy, abs=4 * float(energies.std()) / 200)


@pytest.mark.parametrize("name", ["dw4", "lj13"])
def test_energies_of_particles_are_invariant(name: str) -> None:
    target = TARGETS[name]()
    n, d = target.particles or 0, target.dim // (target.particles or 1)
    x = 1.5 * torch.randn(6, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = torch.randn(d, d, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rotation = torch.linalg.qr(square).Q
    before = target.energy(x.flatten(1))
    strided = x.flatten(1).T.contiguous().T
    for moved in (x @ rotation, x.flip(1), x + 3.0, strided):
        assert torch.allclose(target.energy(moved.flatten(1)), before)
    assert target.energy(strided[:0]).shape == (0,)
    assert torch.allclose(target.coordinates(strided), target.coordinates(x.flatten(1)))


def test_coordinates_of_particles_leave_the_center_of_mass_out() -> None:
    target = TARGETS["lj13"]()
    assert target.free == 36
    y = torch.randn(5, 36, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = target.lift(y)
    assert x.view(5, 13, 3).mean(1).abs().max() < 1e-12
    assert torch.allclose(target.coordinates(x), y)
    assert torch.allclose(target.coordinates(x + 2), y)
    assert torch.allclose(x.square().sum(1), y.square().sum(1))  # so that normal noise is isotropic


def test_a_pair_of_lennard_jones_has_its_minimum_at_distance_1() -> None:
    n = 13
    far = 1e3 * torch.arange(n, dtype=torch.float64)[:, None] * torch.ones(1, 3, dtype=torch.float64)
    far[1] = far[0] + torch.tensor([1.0, 0, 0])
    centered = far - far.mean(0)
    energy = TARGETS["lj13"]().energy(far.view(1, -1)) - centered.square().sum() / 2
    assert float(energy) == pytest.approx(-2, abs=1e-4)  # ordered pairs: twice -1


def test_hamiltonian_chains_reach_a_known_density() -> None:
    target = targets.mixture("normal", torch.zeros(1, 3), 0.25)
    x = reference.hamiltonian(target, 2000, ops.noise_key(0), reference._Chains(60, 5, 2.0))
    assert x.mean(0).abs().max() < 0.05
    assert (x.var(0) - 0.25).abs().max() < 0.03


SOURCE = """
import torch
class Holder:
    pass
number = 3
def good(x): return x.square().sum(1) / 2
def double(x): return x.double().square().sum(1) / 2 + 1e8
def wide(x): return x.square()
def odd(x): return x.square().sum(1) * float("nan")
def flat(x): return x.detach().square().sum(1)
def constant(x): return (x * 0 + 1).detach().sum(1)
def numbers(x): return [1.0]
def failing(x): raise KeyError("nothing")
def counts(x): return x.square().sum(1).long()
def turning(x): return x.square().sum(1) * 1j
def coupled(x): return (x - x.mean(0)).square().sum(1)
def squeezed(x): return x.square().sum(1, keepdim=True).squeeze()
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "own_energies.py"
    path.write_text(SOURCE)
    return path


def test_own_target(module: Path) -> None:
    target, source = custom.load("own_energies:good", 3, None, 1.0)
    assert target.energy(torch.ones(2, 3)).tolist() == [1.5, 1.5]
    assert target.draw is None and target.log_partition is None
    assert custom.load("own_energies:good", 3, None, 1.0)[1] == source
    double = TargetEnergy(custom.load("own_energies:double", 3, None, 1.0)[0])
    assert double.exact(torch.ones(1, 3)).item() == 1e8 + 1.5
    assert double(torch.ones(1, 3)).dtype == torch.float32
    module.write_text(SOURCE.replace("/ 2", "/ 3"))
    target, changed = custom.load("own_energies:good", 3, None, 1.0)
    assert changed != source and target.energy(torch.ones(1, 3)).item() == pytest.approx(1)


def test_annotations_of_an_own_target_are_types(module: Path) -> None:
    """They are evaluated as in Python itself, without the __future__ imports of this package."""
    module.write_text(f"{SOURCE}\ndef typed(x: int): pass\nassert typed.__annotations__['x'] is int")
    custom.load("own_energies:good", 3, None, 1.0)


def test_own_target_of_a_package_in_the_current_folder(module: Path) -> None:
    package = module.parent / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("scale = 2.0")
    (package / "wells.py").write_text("from . import scale\ndef energy(x): return scale * x.square().sum(1)")
    target, _ = custom.load("own_package.wells:energy", 2, None, 1.0)
    assert target.energy(torch.ones(1, 2)).item() == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_energies", r"target must be package\.module:function, got 'own_energies'"),
        ("own_energies.py:good", r"got 'own_energies\.py:good'; did you mean own_energies:good\?"),
        ("own_missing:energy", r"got 'own_missing:energy': no module 'own_missing'"),
        ("own_energies:nothing", r"own_energies\.py, got 'own_energies:nothing': no nothing"),
        ("own_energies:number", r"a function, got 'own_energies:number', an object of type int"),
        ("own_energies:wide", r"must map \[16, 3\] to \[16\] energies, got \[16, 3\]"),
        ("own_energies:odd", r"finite energies, got nan"),
        ("own_energies:flat", r"differentiable by torch, got energies without a gradient"),
        ("own_energies:numbers", r"\[16\] energies, got list"),
        ("own_energies:failing", r"failed on a tensor \[16, 3\]: KeyError"),
        ("own_energies:counts", r"floating-point energies, got torch\.int64"),
        ("own_energies:turning", r"floating-point energies, got torch\.complex64"),
        (
            "own_energies:coupled",
            r"the same energy for a row in batches of any size, got 0 alone and \S+ among 16 rows",
        ),
        ("own_energies:squeezed", r"must map \[1, 3\] to \[1\] energies, got \[\]"),
        ("own_needy:energy", r"'own_needy:energy' cannot be imported: No module named 'own'"),
        ("own_script:energy", r"'own_script:energy' cannot be imported: SystemExit: 3"),
        ("sys:exit", r"a module with Python source, got 'sys:exit'"),
    ],
)
def test_bad_own_targets_are_named(module: Path, name: str, message: str) -> None:
    module.with_name("own_needy.py").write_text("import own")
    module.with_name("own_script.py").write_text("raise SystemExit(3)")
    with pytest.raises(ConfigError, match=message):
        custom.load(name, 3, None, 1.0)
