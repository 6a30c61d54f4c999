"""The roof of the machine, in the same run: memory bandwidth at sizes well beyond the caches.

Imports torch only. Bytes are those read and written.
"""

from __future__ import annotations

from typing import Any

import torch

from places import Place

BYTES = {"cpu": 256 << 20, "cuda": 1 << 30}


def test_copy(measure: Any, place: Place) -> None:
    x = torch.ones(BYTES[place.device.type] // 4, device=place.device)
    y = torch.ones_like(x)  # written, so that its pages are mapped
    call = place.prepare(lambda: y.copy_(x))
    measure(call, "roof", "copy", bytes=2 * x.nbytes, shape=list(x.shape), dtype="float32")


def test_add(measure: Any, place: Place) -> None:
    x = torch.ones(BYTES[place.device.type] // 4, device=place.device)
    y, out = torch.ones_like(x), torch.ones_like(x)
    call = place.prepare(lambda: torch.add(x, y, out=out))
    measure(call, "roof", "add", bytes=3 * x.nbytes, shape=list(x.shape), dtype="float32")
