"""Noise: the contract's format with exact bits of the uniforms, keys, and the statistics of z."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from cases import LAYOUTS, SEED, arguments
from dxmi_ext import ops
from dxmi_ext.method import noise

DEVICES = ("cpu", "emulated", "cuda")

FORMAT_TOLERANCE = 2e-6  # maximum error of float32 z relative to float64, by contract
MAX = 0xFFFFFFFF
KNOWN_ANSWERS = [  # Random123: counter, key, words
    ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MAX, MAX, MAX, MAX], [MAX, MAX], [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def int64_key(seed: int, draw: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor([seed, draw], dtype=torch.int64, device=device)


def assert_format(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=FORMAT_TOLERANCE)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: list[int], key: list[int], words: list[int]) -> None:
    assert reference.philox4x32(np.array(counter), (key[0], key[1])).tolist() == words
    assert torch.ops.dxmi_ext.philox(torch.tensor([counter]), *key).tolist() == [words]


def test_philox_words_equal_the_reference() -> None:
    counters = np.random.default_rng(0).integers(0, 2**32, (1001, 4))
    words = torch.ops.dxmi_ext.philox(torch.from_numpy(counters), 0xDEADBEEF, 7)
    np.testing.assert_array_equal(words.numpy(), reference.philox4x32(counters, (0xDEADBEEF, 7)))


@pytest.mark.parametrize(
    ("shape", "seed", "draw", "timestep", "sample_offset"),
    [
        ((3, 13), 0, 0, 0, 0),
        ((3, 13), 1, 2, 3, 4),
        ((2, 3, 2, 5), 2**32 + 5, 1, 7, 11),  # both key words
        ((2, 9), 2**63 - 1, 2**32 - 1, 2**31, 2**31),
        ((2, 9), -1, 2**32 + 7, 999, 5),  # a negative seed is its two's complement; draw mod 2^32
        ((4, 9), -(2**63), -3, 2**32 - 1, 2**32 - 4),  # the largest indices of rows
        ((4,), 3, 0, 1, 0),
        ((0, 6), 3, 0, 1, 0),
        ((3, 0), 3, 0, 1, 0),
        ((1, 1 << 20), 11, 3, 1, 0),
    ],
)
def test_normal_format(
    shape: tuple[int, ...], seed: int, draw: int, timestep: int, sample_offset: int, device: torch.device
) -> None:
    z = ops.normal(shape, int64_key(seed, draw, device), timestep=timestep, sample_offset=sample_offset)
    assert z.dtype == torch.float32 and z.device.type == device.type and z.is_contiguous()
    assert_format(z, reference.normal(shape, (seed, draw), timestep, sample_offset))


@pytest.mark.parametrize(
    ("row", "pair", "word", "angle"),
    [
        (31377381, 0, 0xFFFFFF9D, False),  # u = 1: z = 0
        (103551615, 0, 0xFFFFFF42, False),  # the largest u below 1
        (266095992, 0, 0x00000008, False),  # |z| up to 6.2
        (262844809, 1, 0x00000007, False),
        (46420298, 0, 0xFFFFFFC1, True),  # 2 pi u1 = 2 pi
        (94212740, 0, 0x00000009, True),  # close to 0, pi / 2, pi, 3 pi / 2
        (202769303, 0, 0x40000004, True),
        (140700811, 0, 0x80000010, True),
        (239970723, 0, 0xBFFFFFF9, True),
    ],
)
def test_normal_of_extreme_words(row: int, pair: int, word: int, angle: bool, device: torch.device) -> None:
    counter = np.array([0, row, reference.RESERVED_TIMESTEP, 0])
    assert reference.philox4x32(counter, (0, 0))[2 * pair + angle] == word  # the row is such a case
    z = ops.normal((1, 4), int64_key(0, 0, device), sample_offset=row)
    assert_format(z, reference.normal((1, 4), (0, 0), sample_offset=row))


def test_normal_default_timestep_is_reserved(device: torch.device) -> None:
    key = ops.noise_key(SEED, device=device)
    assert torch.equal(ops.normal((3, 5), key), ops.normal((3, 5), key, timestep=2**32 - 1))
    assert not torch.equal(ops.normal((3, 5), key), ops.normal((3, 5), key, timestep=0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_normal_converts_the_float32_values(dtype: torch.dtype, device: torch.device) -> None:
    key = ops.noise_key(SEED, device=device)
    z = ops.normal((3, 129), key, dtype=dtype)
    assert z.dtype == dtype and torch.equal(z, ops.normal((3, 129), key).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced", "expanded_rows"])
def test_sampler_step_draws_the_same_noise(layout: str, dtype: torch.dtype, device: torch.device) -> None:
    """With coefficients 0 and std 1, next_sample is `normal` of each row's step, in any memory layout."""
    args = arguments("sampler_step", (5, 3, 2, 7), dtype, device)
    args |= {name: torch.zeros_like(args[name]) for name in ("sample_coef", "output_coef", "log_std")}
    args["sample"] = LAYOUTS[layout](args["sample"])
    next_sample = ops.sampler_step(**args).next_sample
    for n, t in enumerate(args["timestep"].tolist()):
        row = args["sample_offset"] + n
        z = ops.normal((1, 3, 2, 7), args["key"], timestep=t, sample_offset=row, dtype=dtype)
        assert torch.equal(next_sample[n], z[0])


@pytest.mark.parametrize("sizes", [(1, 6), (3, 4), (7,), (2, 0, 5)])
def test_rows_do_not_depend_on_the_batch(sizes: tuple[int, ...], device: torch.device) -> None:
    whole = arguments("sampler_step", (7, 333), device=device)
    names = ("sample", "model_output", "timestep")
    parts, start = [], 0
    for size in sizes:
        part = whole | {name: whole[name][start : start + size] for name in names}
        parts.append(ops.sampler_step(**part | {"sample_offset": whole["sample_offset"] + start}))
        start += size
    for output, pieces in zip(ops.sampler_step(**whole), zip(*parts, strict=True), strict=True):
        assert torch.equal(output, torch.cat(pieces))


def test_noise_key_of_a_seed(device: torch.device) -> None:
    for seed in (0, 5, 2**40, 2**63 - 1, -1):
        key = ops.noise_key(seed, device=device)
        assert key.dtype == torch.int64 and key.device.type == device.type
        assert key.tolist() == [seed, 0]


def test_noise_key_without_seed_comes_from_the_generator(device: torch.device) -> None:
    torch.manual_seed(1)
    first, second = (ops.noise_key(device=device).tolist() for _ in range(2))
    torch.manual_seed(1)
    assert ops.noise_key(device=device).tolist() == first != second
    assert first[1] == second[1] == 0

    state = torch.get_rng_state()
    own = [torch.Generator(device).manual_seed(1) for _ in range(2)]
    first, second = (ops.noise_key(generator=generator, device=device).tolist() for generator in own)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)


def test_noise_key_without_seed_compiles(device: torch.device) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda: ops.noise_key(device=device), fullgraph=True, backend="aot_eager")
    first, second = (compiled().tolist() for _ in range(2))
    assert first != second and first[1] == second[1] == 0


def test_next_key_is_a_new_tensor_with_the_next_draw(device: torch.device) -> None:
    key = int64_key(-5, 41, device)
    following = ops.next_key(key)
    assert following.tolist() == [-5, 42] and key.tolist() == [-5, 41]
    assert following.dtype == torch.int64 and following.device == key.device
    assert not torch.equal(ops.normal((2, 8), key), ops.normal((2, 8), following))


def test_strided_key(device: torch.device) -> None:
    keys = torch.stack([ops.noise_key(SEED, device=device), ops.noise_key(1, device=device)], dim=1)
    assert torch.equal(ops.normal((2, 8), keys[:, 0]), ops.normal((2, 8), ops.noise_key(SEED, device=device)))


def test_random_choices_have_bounds() -> None:
    key = ops.noise_key(SEED)
    for high in (0, 2**53 + 1, 2.5):
        with pytest.raises(ValueError, match=r"randint: high must be .* got"):
            noise.randint(high, 3, key)  # type: ignore[arg-type]
    for offset in (-1, 2**32 - 2):
        with pytest.raises(RuntimeError, match=rf"sample_offset must be in 0..2\*\*32 - N.* got {offset}"):
            noise.randint(7, 3, key, sample_offset=offset)
    draws = noise.Draws(SEED, "test", ["a", "b"])
    assert draws.keys(2**31 - 1)[:, 1].tolist() == [2**32 - 2, 2**32 - 1]  # the last possible draws
    for iteration in (-1, 2**31):
        with pytest.raises(ValueError, match=r"iteration must be in 0..2147483647, got"):
            draws.at(iteration)


def test_statistics(device: torch.device) -> None:
    """Moments, and the Kolmogorov-Smirnov distance to N(0, 1) below its .1 % point; the key is fixed."""
    z = ops.normal((64, 4096), ops.noise_key(SEED, device=device)).cpu().double().flatten()
    n = z.numel()
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert abs((z**3).mean()) < 4 * math.sqrt(15 / n)
    assert abs((z**4).mean() - 3) < 4 * math.sqrt(96 / n)
    cdf = torch.special.ndtr(z.sort().values)
    assert (cdf - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("change", ["seed", "draw", "timestep", "row", "element"])
def test_neighboring_counters_are_uncorrelated(change: str, device: torch.device) -> None:
    key, shape = ops.noise_key(SEED, device=device), (8, 4096)
    z = ops.normal(shape, key, timestep=2)
    other = {
        "seed": lambda: ops.normal(shape, ops.noise_key(SEED + 1, device=device), timestep=2),
        "draw": lambda: ops.normal(shape, ops.next_key(key), timestep=2),
        "timestep": lambda: ops.normal(shape, key, timestep=3),
        "row": lambda: z.roll(1, 0),
        "element": lambda: z.roll(1, 1),
    }[change]()
    assert abs((z * other).mean()) < 4 / math.sqrt(z.numel())


def test_kernels_draw_the_bits_of_the_cpu(device: torch.device) -> None:
    wanted = torch.empty(37, 4099)
    torch.ops.dxmi_ext.normal_(wanted, ops.noise_key(SEED), 3, 11)
    found = ops.normal((37, 4099), ops.noise_key(SEED, device=device), timestep=3, sample_offset=11)
    assert torch.equal(found.cpu(), wanted)
