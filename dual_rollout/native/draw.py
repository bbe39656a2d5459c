"""One draw from q* for each of n rollouts, without a synchronisation; `kernel.py` is the same for GPUs.

The logits of both sides may be rows of one tensor (one model, two prompts) or of two (two models).

The random numbers come from a counter: a draw depends on the seed of its pair and its position alone, whatever else is
in the batch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic

from dual_rollout.native.q_star import AlphaChoice, q_star
from dual_rollout.native.wire import Member

FORCED = 1e30
"""The logit of the drawn token: greater than any other, and finite in what vLLM computes of it."""
PACKED = (
    "row_theta",
    "row_t",
    "seed_low",
    "seed_high",
    "position",
    "cell",
    "temperature",
    "alpha",
    "alpha_min",
    "alpha_max",
)
"""Rows of `packed`, `(10, n)` int64; the last four are the bits of float32."""

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio
ODD = 0x3C6EF373  # below 2^31, as the upper half of a seed is: their sum is never 0, of which _mix makes 0
FIRST_FACTOR, SECOND_FACTOR = 0x85EBCA6B, 0xC2B2AE35  # of MurmurHash3's finaliser

DrawInPlace = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""`(logits, logits_t, packed, record)`: draws for every column of `packed`, between a row of `logits`, which are π_θ's,
and one of `logits_t`; gives the token the greatest logit in both rows of `logits`, which vLLM samples from; writes its
numbers into its cell of `record`, `(cells, len(NUMBERS))`; and moves position and cell on by one."""


class Pairs(NamedTuple):
    """n pairs of rows of one step.

    Attributes:
        rows_theta, rows_t: `(n,)` int64, rows of the logits.
        seeds: `(n, 2)` int32, the lower and the upper half of the seed.
        positions: `(n, 1)` int32, tokens of the rollout before this one.
        choice: of α.
    """

    rows_theta: Tensor
    rows_t: Tensor
    seeds: Tensor
    positions: Tensor
    choice: AlphaChoice


def draw(logits: Tensor, logits_t: Tensor, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """A token per pair, `(n,)` int64, and what is recorded of it, `(n, len(NUMBERS))`; a token id below 2^24 is exact.

    Args:
        logits, logits_t: `(B, V_θ)` and `(B, V_t)`, any floating type.
    """
    q = q_star(logits[pairs.rows_theta], logits_t[pairs.rows_t], pairs.choice)
    # Exponential clocks with rates in proportion to q: the first to ring is a draw from q.
    times = exponential(pairs.seeds, pairs.positions, q.weights.shape[1])
    token = (q.weights / times).argmax(dim=1, keepdim=True)
    numbers = (
        token.float(),
        q.alpha,
        q.logprobs.gather(1, token),
        q.logp_theta.gather(1, token),
        q.logp_t.gather(1, token),
        q.kl_theta,
        q.kl_t,
    )
    return token[:, 0], torch.cat(numbers, dim=1)


def exponential(seeds: Tensor, positions: Tensor, size: int) -> Tensor:
    """`(n, size)` independent standard exponential numbers, a function of seed and position.

    Numbers of 32 bits are put to use in full: the smallest time is 2^-33, so a token of probability far below that is
    drawn too rarely, which all together is less than size · 2^-32 in total variation.
    """
    first = _mix(seeds[:, :1] ^ _mix(positions + _int32(GOLDEN)))
    second = _mix(first ^ _mix(seeds[:, 1:] + ODD))
    tokens = torch.arange(size, dtype=torch.int32, device=seeds.device)
    bits = _mix(_mix(tokens * _int32(GOLDEN) + first) ^ second)
    # In two halves, each exact in float32, so that small numbers keep their low bits.
    high, low = (bits >> 16) & 0xFFFF, bits & 0xFFFF
    uniform = high.float() * 2.0**-16 + (low.float() + 0.5) * 2.0**-32
    return -torch.log1p(-uniform)


def pack(
    rows: Sequence[tuple[int, int]], members: Sequence[Member], positions: Sequence[int], cells: Sequence[int]
) -> np.ndarray:
    """`PACKED` of n pairs, `(10, n)`. Each is one of `members`, of either side."""
    halves = np.array([struct.unpack("<ii", struct.pack("<Q", member.seed)) for member in members])
    floats = [
        (
            member.temperature,
            np.nan if member.rule.fixed_alpha is None else member.rule.fixed_alpha,
            member.rule.alpha_min,
            member.rule.alpha_max,
        )
        for member in members
    ]
    bits = np.array(floats, np.float32).view(np.int32)
    return np.concatenate((np.array(rows).T, halves.T, [positions, cells], bits.T)).astype(np.int64)


def unpack(packed: Tensor) -> Pairs:
    """The pairs that `pack` was given, without their cells."""
    floats = packed[6:].int().view(torch.float32)[:, :, None]
    return Pairs(packed[0], packed[1], packed[2:4].T.int(), packed[4].int()[:, None], AlphaChoice(*floats))


def set_alpha(packed: Tensor, columns: Tensor, alpha: Tensor) -> None:
    """Fix α, `(k, 1)`, of k pairs for the next draw."""
    packed[PACKED.index("alpha"), columns] = alpha[:, 0].contiguous().view(torch.int32).long()


def compiled_draw(backend: str = "inductor") -> DrawInPlace:
    """`draw` compiled for the vocabulary that it meets first and any numbers of rows and pairs."""
    compiled = torch.compile(draw, backend=backend)

    def in_place(logits: Tensor, logits_t: Tensor, packed: Tensor, record: Tensor) -> None:
        pairs = unpack(packed)
        # A graph for any number of pairs or rows is one for two and more; a pair that comes twice draws the same.
        if packed.shape[1] == 1:
            pairs = unpack(packed.repeat(1, 2))
        theta = at_least_two(logits)
        t = theta if logits_t is logits else at_least_two(logits_t)
        for tensor in (theta, t, *pairs[:4], *pairs.choice):
            maybe_mark_dynamic(tensor, 0)
        tokens, numbers = compiled(theta, t, pairs)
        logits[pairs.rows_theta, tokens] = FORCED
        logits[pairs.rows_t, tokens] = FORCED
        record[packed[5]] = numbers[: packed.shape[1]]
        packed[4:6] += 1

    return in_place


def at_least_two(rows: Tensor) -> Tensor:
    """The rows, twice where there is one alone: a compiled graph for any number of rows is one for two and more."""
    return rows if len(rows) > 1 else torch.cat((rows, rows))


def _mix(bits: Tensor) -> Tensor:
    """Every bit of an int32 spread over all of them: the finaliser of MurmurHash3, a bijection."""
    bits = (bits ^ _shift(bits, 16)) * _int32(FIRST_FACTOR)
    bits = (bits ^ _shift(bits, 13)) * _int32(SECOND_FACTOR)
    return bits ^ _shift(bits, 16)


def _shift(bits: Tensor, count: int) -> Tensor:
    """A shift to the right that moves in zeros, as that of an unsigned number does."""
    return (bits >> count) & ((1 << (32 - count)) - 1)


def _int32(bits: int) -> int:
    """The int32 with the bits of an unsigned number, whose products and sums then have its bits too."""
    return bits - (bits >> 31 << 32)
