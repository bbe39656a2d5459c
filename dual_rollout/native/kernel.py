"""`draw.draw` as one Triton kernel, a program per pair: launching its parts one by one costs more than their work.

The arithmetic is that of `draw.py` and `q_star.py`, whose constants it takes. `tests/gpu/test_pairs.py` compares them,
and `tests/vllm/test_kernel.py` does by Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from dual_rollout.native.draw import FIRST_FACTOR, FORCED, GOLDEN, ODD, PACKED, SECOND_FACTOR
from dual_rollout.native.q_star import HALLEY_ROUNDS, LOG_ZERO, ROUNDING, SAME
from dual_rollout.native.wire import NUMBERS

_BLOCK = 4096
_WARPS = 16

# A kernel sees no globals but these.
_HALLEY_ROUNDS, _ROUNDING, _SAME = tl.constexpr(HALLEY_ROUNDS), tl.constexpr(ROUNDING), tl.constexpr(SAME)
_LOG_ZERO, _BELOW_ALL = tl.constexpr(LOG_ZERO), tl.constexpr(2.0 * LOG_ZERO)
_GOLDEN, _ODD, _FORCED = tl.constexpr(GOLDEN), tl.constexpr(ODD), tl.constexpr(FORCED)
_FIRST_FACTOR, _SECOND_FACTOR = tl.constexpr(FIRST_FACTOR), tl.constexpr(SECOND_FACTOR)
# Where in `packed` and in `record` each is, in the order of `PACKED` and of `NUMBERS`.
_ROW_THETA, _ROW_T, _SEED_LOW, _SEED_HIGH, _POSITION, _CELL, _TEMPERATURE, _FIXED, _ALPHA_MIN, _ALPHA_MAX = map(
    tl.constexpr, range(len(PACKED))
)
_TOKEN, _ALPHA, _LOGPROB_Q, _LOGPROB_THETA, _LOGPROB_T, _KL_THETA, _KL_T = map(tl.constexpr, range(len(NUMBERS)))


@triton.jit
def _mix(bits):
    bits = (bits ^ (bits >> 16)) * _FIRST_FACTOR
    bits = (bits ^ (bits >> 13)) * _SECOND_FACTOR
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
    return tl.maximum(_load(pointer, offsets, size, temperature) - normaliser, _LOG_ZERO)


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
def _balanced_alpha(theta, t, size, temperature, normaliser_theta, normaliser_t, BLOCK: tl.constexpr):
    """`q_star.balanced_alpha`."""
    lanes = tl.arange(0, BLOCK)
    alpha = tl.full((), 0.5, tl.float32)
    low = -0.5
    high = 1.5
    for _ in range(_HALLEY_ROUNDS):
        peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, _LOG_ZERO, BLOCK)
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
            common = (tl.minimum(logp, logp_t) > _LOG_ZERO) & (begin + lanes < size)
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
        inside = (step >= low - _ROUNDING) & (step <= high + _ROUNDING)  # NaN is not
        step = tl.where(inside, step, 0.5 * (low + high))
        step = tl.minimum(tl.maximum(step, 0.0), 1.0)
        alpha = tl.where(sum_a + sum_b <= total * _SAME, alpha, step)
    return alpha


@triton.jit
def _packed(mine, pairs, ROW: tl.constexpr):
    return tl.load(mine + pairs * ROW)


@triton.jit
def _packed_float(mine, pairs, ROW: tl.constexpr):
    return _packed(mine, pairs, ROW).to(tl.int32).to(tl.float32, bitcast=True)


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
    theta = logits + _packed(mine, pairs, _ROW_THETA) * stride
    row_t = _packed(mine, pairs, _ROW_T)
    t = logits_t + row_t * stride_t
    seed_low = _packed(mine, pairs, _SEED_LOW).to(tl.uint32)
    seed_high = _packed(mine, pairs, _SEED_HIGH).to(tl.uint32)
    position = _packed(mine, pairs, _POSITION)
    cell = _packed(mine, pairs, _CELL)
    temperature = _packed_float(mine, pairs, _TEMPERATURE)
    fixed = _packed_float(mine, pairs, _FIXED)
    alpha_min = _packed_float(mine, pairs, _ALPHA_MIN)
    alpha_max = _packed_float(mine, pairs, _ALPHA_MAX)

    normaliser_theta = _log_normaliser(theta, size_theta, temperature, BLOCK)
    normaliser_t = _log_normaliser(t, size_t, temperature, BLOCK)
    size = tl.minimum(size_theta, size_t)  # of the tokens that both have
    alpha = fixed
    if fixed != fixed:  # NaN
        alpha = _balanced_alpha(theta, t, size, temperature, normaliser_theta, normaliser_t, BLOCK)
    alpha = tl.minimum(tl.maximum(alpha, alpha_min), alpha_max)
    at_an_end = (fixed == 0.0) | (fixed == 1.0) | (alpha_max == 0.0) | (alpha_min == 1.0)
    floor = tl.where(at_an_end, _BELOW_ALL, _LOG_ZERO)
    peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, floor, BLOCK)
    disjoint = peak == -float("inf")
    alpha = tl.where(disjoint, 0.0, alpha)
    floor = tl.where(disjoint, _BELOW_ALL, floor)
    if disjoint:
        peak = _peak(theta, t, size, temperature, normaliser_theta, normaliser_t, alpha, floor, BLOCK)

    first = _mix(seed_low ^ _mix(position.to(tl.uint32) + _GOLDEN))
    second = _mix(first ^ _mix(seed_high + _ODD))
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
        bits = _mix(_mix(offsets.to(tl.uint32) * _GOLDEN + first) ^ second)
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
    tl.store(own + _TOKEN, token.to(tl.float32))
    tl.store(own + _ALPHA, alpha)
    tl.store(own + _LOGPROB_Q, (1.0 - alpha) * logp_theta + alpha * logp_target - psi)
    tl.store(own + _LOGPROB_THETA, logp_theta)
    tl.store(own + _LOGPROB_T, logp_target)
    tl.store(own + _KL_THETA, tl.maximum(alpha * rate - psi, 0.0))
    tl.store(own + _KL_T, tl.maximum((alpha - 1.0) * rate - psi, 0.0))
    tl.debug_barrier()  # every thread has read the rows
    tl.store(theta + token, _FORCED)
    tl.store(logits + row_t * stride + token, _FORCED)
    tl.store(mine + pairs * _POSITION, position + 1)
    tl.store(mine + pairs * _CELL, cell + 1)


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
