"""Build backend: scikit-build-core, built against the torch that is already installed.

Under build isolation pip hides the environment's packages from the build and would fetch a second,
perhaps different torch. This backend asks the same interpreter, without the isolation, where its torch
lies; only where there is none does torch become a build requirement. The extension uses torch's stable
ABI, so either build serves every torch >= 2.10.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import wraps

from scikit_build_core import build as _core

_PROBE = (
    "import importlib.util as u; torch = u.find_spec('torch'); "
    "print(torch.submodule_search_locations[0] if torch else '')"
)


if sys.platform != "linux":
    raise SystemExit(f"dxmi_ext is supported on Linux only so far, not on {sys.platform}")


def _installed_torch() -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    return subprocess.run(
        [sys.executable, "-c", _PROBE], env=environment, cwd="/", check=True, text=True, capture_output=True
    ).stdout.strip()


def _requires(hook):
    @wraps(hook)
    def wrapped(config_settings=None):
        return hook(config_settings) + ([] if _installed_torch() else ["torch>=2.10"])

    return wrapped


def _build(hook):
    @wraps(hook)
    def wrapped(wheel_directory, config_settings=None, metadata_directory=None):
        settings = dict(config_settings or {})
        # Empty: CMake asks the build environment, whatever an earlier build left in its cache.
        settings.setdefault("cmake.define.DXMI_TORCH_DIR", _installed_torch())
        if compiler := re.sub(r"[^\w+.]+", "-", os.environ.get("CXX", "")):
            # CMake stays with the compiler of an earlier build in the same folder, whatever CXX says now.
            settings.setdefault("build-dir", f"build/{{wheel_tag}}-{compiler.strip('-')}")
        return hook(wheel_directory, settings, metadata_directory)

    return wrapped


get_requires_for_build_wheel = _requires(_core.get_requires_for_build_wheel)
get_requires_for_build_editable = _requires(_core.get_requires_for_build_editable)
get_requires_for_build_sdist = _core.get_requires_for_build_sdist
prepare_metadata_for_build_wheel = _core.prepare_metadata_for_build_wheel
prepare_metadata_for_build_editable = _core.prepare_metadata_for_build_editable
build_wheel = _build(_core.build_wheel)
build_editable = _build(_core.build_editable)
build_sdist = _core.build_sdist
