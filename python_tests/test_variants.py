"""The CPU variants (baseline, AVX2, AVX-512) give the same bits. As a script, prints the digests of one."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from functools import cache

import pytest
import torch
from torch import Tensor

from cases import DIFFERENTIABLE, LAYOUTS, PARAMETERS, arguments, call, with_leaves
from dxmi_ext import _native

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (4,), (37, 7), (21, 100), (3, 129), (2, 20_011), (5, 3, 7, 5)]


def digest(tensor: Tensor) -> str:
    """SHA-256 of the values' bytes in logical order."""
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def digests() -> dict[str, str]:
    """Digests of all outputs and gradients, and the variant that computed them."""
    found = {"variant": _native.cpu_variant()}
    for op in sorted(PARAMETERS.keys() - {"noise_key", "next_key"}):
        for dtype in DTYPES:
            for shape in SHAPES:
                for layout in ("contiguous", "transposed"):
                    args = arguments(op, shape, dtype)
                    for name in {"sample", "next_sample"} & args.keys():
                        args[name] = LAYOUTS[layout](args[name])
                    args, leaves = with_leaves(args, DIFFERENTIABLE.get(op, ()))
                    results = list(call(op, args))
                    if leaves:
                        weights = [torch.sin(y.detach() * 9) for y in results]
                        results += torch.autograd.grad(results, list(leaves.values()), weights)
                    for i, result in enumerate(results):
                        found[f"{op} {dtype} {shape} {layout} {i}"] = digest(result)
    return found


def run(variant: str) -> subprocess.CompletedProcess[str]:
    """Runs this file as a script in a process with a variant."""
    environment = os.environ | {"DXMI_CPU_VARIANT": variant}
    return subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)


@cache
def digests_of(variant: str) -> dict[str, str]:
    done = run(variant)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("variant", ["avx2", "avx512"])
def test_variant_returns_the_bits_of_the_baseline(variant: str) -> None:
    if variant not in _native.cpu_variants():
        pytest.skip(f"this processor or build has no {variant}")
    baseline, other = digests_of("baseline"), digests_of(variant)
    assert (baseline["variant"], other["variant"]) == ("baseline", variant)
    assert [name for name in baseline if baseline[name] != other[name]] == ["variant"]


def test_unknown_variant_is_rejected() -> None:
    done = run("abacus")
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0
    assert last.startswith("ImportError: DXMI_CPU_VARIANT must be one of ") and last.endswith("got 'abacus'")


if __name__ == "__main__":
    print(json.dumps(digests()))
