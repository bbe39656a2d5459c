"""`draw.draw` as one Triton kernel, a program per pair: launching its parts one by one costs more than their work.

Constants and arithmetic are those of `draw.py` and `q_star.py`; `tests/gpu/test_pairs.py` compares them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dual_rollout.native.wire import NUMBERS

_BLOCK = 4096
_WARPS = 16


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    return bits ^ (bits >> 16)


@triton.jit
def _load(pointer, offsets, size, temperature):
    logits = tl.load(pointer + offsets, mask=offsets < size, other=-float("inf")).to(tl.float32)
    return tl.div_rn(logits, temperature)


@triton.jit
def _log_normaliser(pointer, size, temperature, BLOCK: tl.constexpr):
    """log Σ exp(logits / temperature)."""
    lanes = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), -float("inf"), tl.float32)
    for begin in range(0, size, BLOCK):
        peaks = tl.maximum(peaks, _load(pointer, begin + lanes, size, temperature))
    peak = tl.max(peaks)
    totals = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, size, BLOCK):
        totals += tl.exp(_load(pointer, begin + lanes, size, temperature) - peak)
    return peak + tl.log(tl.sum(totals))


@triton.jit
def _logprobs(pointer, offsets, size, temperature, normaliser):
    return tl.maximum(_load(pointer, offsets, size, temperature) - normaliser, -1e4)


@triton.jit
def _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, floor, BLOCK: tl.constexpr):
    """The largest log π_θ^(1−α) π_t^α of tokens above `floor` in both; −inf where there is none."""
    lanes = tl.arange(0, BLOCK)
    peaks = tl.full((BLOCK,), -float("inf"), tl.float32)
    for begin in range(0, size, BLOCK):
        logp = _logprobs(theta, begin + lanes, size, temperature, normaliser_theta)
        logp_t = _logprobs(t, begin + lanes, size, temperature, normaliser_t)
        possible = tl.minimum(logp, logp_t) > floor
        peaks = tl.maximum(peaks, tl.where(possible, (1.0 - alpha) * logp + alpha * logp_t, -float("inf")))
    return tl.max(peaks)


@triton.jit
def _balanced_alpha(
    theta, t, size, temperature, normaliser_theta, normaliser_t, ROUNDS: tl.constexpr, BLOCK: tl.constexpr
):
    """`q_star.balanced_alpha`."""
    lanes = tl.arange(0, BLOCK)
    alpha = tl.full((), 0.5, tl.float32)
    low = -0.5
    high = 1.5
    for _ in range(ROUNDS):
        peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, -1e4, BLOCK)
        totals = tl.zeros((BLOCK,), tl.float32)
        a = tl.zeros((BLOCK,), tl.float32)
        a1 = tl.zeros((BLOCK,), tl.float32)
        a2 = tl.zeros((BLOCK,), tl.float32)
        b = tl.zeros((BLOCK,), tl.float32)
        b1 = tl.zeros((BLOCK,), tl.float32)
        b2 = tl.zeros((BLOCK,), tl.float32)
        for begin in range(0, size, BLOCK):
            logp = _logprobs(theta, begin + lanes, size, temperature, normaliser_theta)
            logp_t = _logprobs(t, begin + lanes, size, temperature, normaliser_t)
            slope = logp_t - logp
            common = (tl.minimum(logp, logp_t) > -1e4) & (begin + lanes < size)
            weight = tl.where(common, tl.exp(logp + alpha * slope - peak), 0.0)
            up = tl.maximum(slope, 0.0)
            down = tl.maximum(-slope, 0.0)
            totals += weight
            a += weight * up
            a1 += weight * up * up
            a2 += weight * up * up * up
            b += weight * down
            b1 += weight * down * down
            b2 += weight * down * down * down
        total = tl.sum(totals)
        sum_a = tl.sum(a)
        sum_b = tl.sum(b)
        low = tl.where(sum_a < sum_b, alpha, low)
        high = tl.where(sum_a > sum_b, alpha, high)
        gap = tl.log(sum_a) - tl.log(sum_b)
        second_a = tl.sum(a1) / sum_a
        second_b = tl.sum(b1) / sum_b
        rate = second_a + second_b
        curvature = tl.sum(a2) / sum_a - second_a * second_a - tl.sum(b2) / sum_b + second_b * second_b
        step = alpha - 2.0 * gap * rate / (2.0 * rate * rate - gap * curvature)
        inside = (step >= low - 1e-5) & (step <= high + 1e-5)  # NaN is not
        step = tl.where(inside, step, 0.5 * (low + high))
        step = tl.minimum(tl.maximum(step, 0.0), 1.0)
        alpha = tl.where(sum_a + sum_b <= 1e-6 * total, alpha, step)
    return alpha


@triton.jit(do_not_specialize=["pairs"])  # or 1 and multiples of 16 would be compiled when they first come
def _draw(
    logits,
    stride,
    size_theta,
    logits_t,
    stride_t,
    size_t,
    packed,
    pairs,
    record,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    mine = packed + tl.program_id(0)
    theta = logits + tl.load(mine) * stride
    row_t = tl.load(mine + pairs)
    t = logits_t + row_t * stride_t
    seed_low = tl.load(mine + 2 * pairs).to(tl.uint32)
    seed_high = tl.load(mine + 3 * pairs).to(tl.uint32)
    position = tl.load(mine + 4 * pairs)
    cell = tl.load(mine + 5 * pairs)
    temperature = tl.load(mine + 6 * pairs).to(tl.int32).to(tl.float32, bitcast=True)
    fixed = tl.load(mine + 7 * pairs).to(tl.int32).to(tl.float32, bitcast=True)
    alpha_min = tl.load(mine + 8 * pairs).to(tl.int32).to(tl.float32, bitcast=True)
    alpha_max = tl.load(mine + 9 * pairs).to(tl.int32).to(tl.float32, bitcast=True)

    normaliser_theta = _log_normaliser(theta, size_theta, temperature, BLOCK)
    normaliser_t = _log_normaliser(t, size_t, temperature, BLOCK)
    size = tl.minimum(size_theta, size_t)  # of the tokens that both have
    alpha = fixed
    if fixed != fixed:  # NaN
        alpha = _balanced_alpha(theta, t, size, temperature, normaliser_theta, normaliser_t, 4, BLOCK)
    alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    at_an_end = (fixed == 0.0) | (fixed == 1.0) | (alpha_max == 0.0) | (alpha_min == 1.0)
    floor = tl.where(at_an_end, -2e4, -1e4)  # log 0 is -1e4
    peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, floor, BLOCK)
    disjoint = peak == -float("inf")
    alpha = tl.where(disjoint, 0.0, alpha)
    floor = tl.where(disjoint, -2e4, floor)
    if disjoint:
        peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, floor, BLOCK)

    first = _mix(seed_low ^ _mix(position.to(tl.uint32) + 0x9E3779B9))
    second = _mix(first ^ _mix(seed_high + 0x3C6EF373))
    lanes = tl.arange(0, BLOCK)
    totals = tl.zeros((BLOCK,), tl.float32)
    rates = tl.zeros((BLOCK,), tl.float32)
    best = tl.full((BLOCK,), -1.0, tl.float32)
    tokens = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, size, BLOCK):
        offsets = begin + lanes
        logp = _logprobs(theta, offsets, size, temperature, normaliser_theta)
        logp_t = _logprobs(t, offsets, size, temperature, normaliser_t)
        possible = (offsets < size) & (tl.minimum(logp, logp_t) > floor)
        weight = tl.where(possible, tl.exp((1.0 - alpha) * logp + alpha * logp_t - peak), 0.0)
        totals += weight
        rates += weight * (logp_t - logp)
        bits = _mix(_mix(offsets.to(tl.uint32) * 0x9E3779B9 + first) ^ second)
        uniform = (bits >> 16).to(tl.float32) * (2.0**-16) + ((bits & 0xFFFF).to(tl.float32) + 0.5) * (2.0**-32)
        score = tl.where(offsets < size, weight / -libdevice.log1p(-uniform), -1.0)
        better = score > best
        best = tl.where(better, score, best)
        tokens = tl.where(better, offsets, tokens)
    token = tl.min(tl.where(best == tl.max(best), tokens, 2147483647))
    total = tl.sum(totals)
    psi = peak + tl.log(total)
    rate = tl.sum(rates) / total
    logp_theta = _logprobs(theta, token, size, temperature, normaliser_theta)
    logp_target = _logprobs(t, token, size, temperature, normaliser_t)
    own = record + cell * COLUMNS
    tl.store(own, token.to(tl.float32))
    tl.store(own + 1, alpha)
    tl.store(own + 2, (1.0 - alpha) * logp_theta + alpha * logp_target - psi)
    tl.store(own + 3, logp_theta)
    tl.store(own + 4, logp_target)
    tl.store(own + 5, tl.maximum(alpha * rate - psi, 0.0))
    tl.store(own + 6, tl.maximum((alpha - 1.0) * rate - psi, 0.0))
    tl.debug_barrier()  # every thread has read the rows
    tl.store(theta + token, 1e30)
    tl.store(logits + row_t * stride + token, 1e30)
    tl.store(mine + 4 * pairs, position + 1)
    tl.store(mine + 5 * pairs, cell + 1)


def draw_in_place(logits: Tensor, logits_t: Tensor, packed: Tensor, record: Tensor) -> None:
    """A `draw.DrawInPlace`; each row of the logits is contiguous."""
    assert logits.stride(1) == logits_t.stride(1) == 1 and packed.is_contiguous() and record.is_contiguous()
    pairs = packed.shape[1]
    with torch.cuda.device(logits.device):
        _draw[(pairs,)](
            logits,
            logits.stride(0),
            logits.shape[1],
            logits_t,
            logits_t.stride(0),
            logits_t.shape[1],
            packed,
            pairs,
            record,
            COLUMNS=len(NUMBERS),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
