"""Sequences from q* of two transformers models in this process: batched, over the full vocabulary, KV caches kept.

For an experiment at small scale, where the question is what a distribution teaches and not how to serve it. On a GPU
the decoding step (both models, α, the draw) is one CUDA graph; elsewhere the same function runs eagerly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dual_rollout.native.q_star import balanced_alpha, log_softmax
from dual_rollout.training.rollout_batch import RolloutBatch

torch._dynamo.config.recompile_limit = 64  # one for each number of rows and each method

Method = Literal["policy", "kl_symmetry", "kl_budget", "fixed"]
_LOG_ZERO = -1e3
_BUDGET_ROUNDS = 24
_STEPS_BETWEEN_CHECKS = 16  # of whether all sequences have ended, which makes the CPU wait for the GPU


class Path(NamedTuple):
    """q_α of B positions: `(B, V)` log-probabilities, and `(B, 1)` α, KL(q‖π_θ) and KL(q‖π_t), nats."""

    logprobs: Tensor
    alpha: Tensor
    kl_theta: Tensor
    kl_t: Tensor


def path_distribution(logits_theta: Tensor, logits_t: Tensor, method: Method, value: Tensor) -> Path:
    """q_α ∝ π_θ^(1−α) π_t^α with α chosen per row.

    Args:
        logits_theta, logits_t: `(B, V)`.
        method: "kl_symmetry", "kl_budget" (`value` nats from π_θ at most), "fixed" (α = `value`).
        value: a scalar on the same device.
    """
    logp_theta, logp_t = (log_softmax(logits, 1.0).clamp(min=_LOG_ZERO) for logits in (logits_theta, logits_t))
    slope = logp_t - logp_theta
    if method == "kl_symmetry":
        alpha = balanced_alpha(logp_theta, slope)
    elif method == "kl_budget":
        alpha = budget_alpha(logp_theta, slope, value)
    else:
        alpha = value.expand(len(slope), 1)
    path = logp_theta + alpha * slope
    psi = path.logsumexp(dim=1, keepdim=True)
    logprobs = path - psi
    mean = (logprobs.exp() * slope).sum(dim=1, keepdim=True)
    kl_theta, kl_t = alpha * mean - psi, (alpha - 1.0) * mean - psi
    return Path(logprobs, alpha, kl_theta.clamp(min=0.0), kl_t.clamp(min=0.0))


def budget_alpha(logp_theta: Tensor, slope: Tensor, budget: Tensor) -> Tensor:
    """The largest α in [0, 1] with KL(q_α‖π_θ) ≤ `budget` nats, `(B, 1)`: `kl_budget_alpha` of `functional` in torch.

    A fixed number of rounds of Newton's method on the square root of the divergence, from α = 1, inside a bracket.
    """
    alpha = torch.ones_like(slope[:, :1])
    low, high = torch.zeros_like(alpha), alpha
    for _ in range(_BUDGET_ROUNDS):
        path = logp_theta + alpha * slope
        psi = path.logsumexp(dim=1, keepdim=True)
        q = (path - psi).exp()
        mean = (q * slope).sum(dim=1, keepdim=True)
        variance = (q * (slope - mean) ** 2).sum(dim=1, keepdim=True)
        root = (alpha * mean - psi).clamp(min=0.0).sqrt()
        excess = root - budget.sqrt()
        low, high = torch.where(excess <= 0, alpha, low), torch.where(excess > 0, alpha, high)
        newton = alpha - excess * 2.0 * root / (alpha * variance)
        inside = (newton > low) & (newton < high)
        alpha = torch.where(inside, newton, 0.5 * (low + high))
    return alpha * (budget > 0)


def draw_token(logits: list[Tensor], noise: Tensor | None, method: Method, value: Tensor) -> tuple[Tensor, Tensor]:
    """A token per row, and its numbers.

    Args:
        logits: π_θ's, and π_t's unless `method` is "policy"; `(B, V)` each.
        noise: `(B, V)` from the exponential distribution, which makes it a draw; None for π_θ's most likely token.

    Returns:
        `(B, 1)` token ids, and `(6, B, 1)` α, log q, log π_θ, log π_t of the token, KL(q‖π_θ) and KL(q‖π_t).
    """
    logp = [log_softmax(rows, 1.0) for rows in logits]
    if method == "policy":
        zero = torch.zeros_like(logp[0][:, :1])
        path = Path(logp[0], zero, zero, zero)
    else:
        path = path_distribution(logits[0], logits[1], method, value)
    # By the Gumbel trick the argmax of log q plus noise is a draw from q.
    token = (logp[0] if noise is None else path.logprobs - noise.log()).argmax(dim=1, keepdim=True)
    log_theta = logp[0].gather(1, token)
    log_t = logp[1].gather(1, token) if len(logp) > 1 else torch.full_like(log_theta, torch.nan)
    return token, torch.stack([path.alpha, path.logprobs.gather(1, token), log_theta, log_t, path.kl_theta, path.kl_t])


@dataclass
class Samples:
    """Sequences with the numbers of their tokens.

    Attributes:
        batch: as a rollout over servers gives it.
        kl_theta, kl_t: `(B, T)` KL(q‖π_θ) and KL(q‖π_t) at every position, nats; 0 at padding.
    """

    batch: RolloutBatch
    kl_theta: Tensor
    kl_t: Tensor


class PairSampler:
    """Draws `rows` sequences at a time from q* between `policy` and `target`, which are read where they are.

    The policy's weights may change between calls: as its parameters are updated in place, there is nothing to sync.

    Args:
        policy, target: causal language models with one vocabulary, on one device; no target: method "policy" alone.
        rows: sequences at a time; more are drawn in turns.
        prompt_width: tokens of the longest prompt, of either model.
        max_tokens: tokens per sequence at most.
        stop_id: ends a sequence.
    """

    def __init__(
        self, policy: Any, target: Any, *, rows: int, prompt_width: int, max_tokens: int, stop_id: int, seed: int = 0
    ):
        self._device = next(policy.parameters()).device
        self._graphs: dict[tuple[Method, bool], Callable[[], None]] = {}
        self._rows, self._prompt_width, self._max_tokens, self._stop = rows, prompt_width, max_tokens, stop_id
        self._sides = [_Side(model, rows, prompt_width, max_tokens) for model in (policy, target) if model is not None]
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._value = torch.zeros((), device=self._device)
        self._tokens = torch.zeros(rows, max_tokens, dtype=torch.long, device=self._device)
        self._numbers = torch.zeros(6, rows, max_tokens, device=self._device)
        self._position = torch.zeros(1, dtype=torch.long, device=self._device)
        self._ended = torch.zeros(rows, 1, dtype=torch.bool, device=self._device)
        self._draw_token = torch.compile(draw_token, dynamic=False) if self._device.type == "cuda" else draw_token

    @property
    def has_target(self) -> bool:
        return len(self._sides) > 1

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        t_prompts: Sequence[Sequence[int]] | None = None,
        *,
        method: Method,
        value: float = 0.0,
        greedy: bool = False,
        seed: int | None = None,
    ) -> Samples:
        """One sequence per prompt, at temperature 1.

        Args:
            prompts, t_prompts: token ids, as either model sees them; `t_prompts` are `prompts` when None.
            method, value: what chooses α, see `path_distribution`; "policy": from π_θ alone, α = 0, log π_t NaN.
            greedy: π_θ's most likely token instead of a draw.
            seed: makes the call repeatable; None goes on in the sampler's random stream.
        """
        if seed is not None:
            self._generator.manual_seed(seed)
        sides = [list(prompts), list(prompts if t_prompts is None else t_prompts)][: len(self._sides)]
        parts = [
            self._draw([side[start : start + self._rows] for side in sides], method, value, greedy)
            for start in range(0, len(prompts), self._rows)
        ]
        tokens, numbers = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        return _as_samples(sides[0], tokens, numbers, self._stop)

    def _draw(
        self, sides: list[list[Sequence[int]]], method: Method, value: float, greedy: bool
    ) -> tuple[Tensor, Tensor]:
        count = len(sides[0])
        used = self._sides[:1] if method == "policy" else self._sides
        for side, prompts in zip(used, sides, strict=False):
            side.prefill([prompts[i % count] for i in range(self._rows)], self._stop)
        self._value.fill_(value)
        self._position.zero_()
        self._ended.zero_()
        step = self._step(method, greedy, used)
        for i in range(self._max_tokens):
            step()
            if i % _STEPS_BETWEEN_CHECKS == _STEPS_BETWEEN_CHECKS - 1 and bool(self._ended[:count].all()):
                self._tokens[:, i + 1 :] = self._stop
                break
        return self._tokens[:count].clone(), self._numbers[:, :count].clone()

    def _step(self, method: Method, greedy: bool, used: list[_Side]) -> Callable[[], None]:
        """One position of all sequences: a draw, then both models' next logits."""

        def step() -> None:
            noise = None if greedy else torch.empty_like(used[0].logits).exponential_(generator=self._generator)
            token, column = self._draw_token([side.logits for side in used], noise, method, self._value)
            token = torch.where(self._ended, self._stop, token)
            self._tokens.index_copy_(1, self._position, token)
            self._numbers.index_copy_(2, self._position, column)
            self._ended.logical_or_(token == self._stop)
            self._position.add_(1)
            _advance_side_by_side(used, token)

        if self._device.type != "cuda":
            return step
        key = (method, greedy)
        if key not in self._graphs:
            self._graphs[key] = self._captured(step, used)
        return self._graphs[key]

    def _captured(self, step: Callable[[], None], used: list[_Side]) -> Callable[[], None]:
        """`step` as a CUDA graph. What warming up and capturing did to the state is undone."""
        saved = [side.logits.clone() for side in used], self._generator.get_state()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(self._generator)
        with torch.cuda.graph(graph):
            step()
        self._position.zero_()
        self._ended.zero_()
        self._generator.set_state(saved[1])
        for side, logits in zip(used, saved[0], strict=True):
            side.logits.copy_(logits)
            side.rewind()
        return graph.replay


class _Side:
    """One model, its cache and the logits of the next position, in tensors that stay where they are."""

    def __init__(self, model: Any, rows: int, prompt_width: int, max_tokens: int):
        config, embedding = model.config, model.get_input_embeddings().weight
        if config.model_type != "llama":
            raise ValueError(f"the sampler's decoding step is that of Llama models, not of {config.model_type}")
        self._model, self._width = model, prompt_width
        length, device = prompt_width + max_tokens, embedding.device
        cache = (rows, config.num_key_value_heads, length, config.head_dim)
        self._keys = [torch.zeros(cache, device=device) for _ in model.model.layers]
        self._values = [torch.zeros(cache, device=device) for _ in model.model.layers]
        self._columns = torch.arange(length, device=device)
        self._is_prompt = torch.zeros(rows, length, dtype=torch.bool, device=device)
        self._next = torch.zeros(rows, 1, dtype=torch.long, device=device)  # position of the next token in its sequence
        self._slot = torch.zeros(1, dtype=torch.long, device=device)  # and its column in the cache
        self._layer = torch.compile(decode_layer, dynamic=False) if device.type == "cuda" else decode_layer
        self.logits = torch.zeros(rows, config.vocab_size, device=device)

    def prefill(self, prompts: list[Sequence[int]], pad: int) -> None:
        """Read the prompts, each different one once."""
        width, device = self._width, self.logits.device
        longest = max(map(len, prompts))
        if longest > width:
            raise ValueError(f"a prompt has {longest} tokens, more than prompt_width = {width}")
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}
        ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in place], device=device)
        lengths = torch.tensor([[len(row)] for row in place], device=device)
        real = self._columns[:width] >= width - lengths
        output = self._model(
            input_ids=ids,
            attention_mask=real.long(),
            position_ids=(real.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
        )
        row = torch.tensor([place[tuple(prompt)] for prompt in prompts], device=device)
        for keys, values, read in zip(self._keys, self._values, output.past_key_values.layers, strict=True):
            keys[:, :, :width] = read.keys[row]
            values[:, :, :width] = read.values[row]
        self.logits.copy_(output.logits[row, -1])
        self._is_prompt[:, :width] = real[row]
        self._next.copy_(lengths[row])
        self._slot.fill_(width)

    def advance(self, token: Tensor) -> None:
        """Append one token `(B, 1)` to every sequence."""
        allowed = self._is_prompt | ((self._columns >= self._width) & (self._columns <= self._slot))
        base = self._model.model
        hidden = base.embed_tokens(token[:, 0])
        turn = [part[:, 0] for part in base.rotary_emb(hidden, position_ids=self._next)]
        for layer, keys, values in zip(base.layers, self._keys, self._values, strict=True):
            hidden = self._layer(
                hidden, _weights(layer), self._model.config.rms_norm_eps, turn, allowed, self._slot, keys, values
            )
        self.logits.copy_(self._model.lm_head(base.norm(hidden)))
        self._next.add_(1)
        self._slot.add_(1)

    def rewind(self) -> None:
        """Back to the end of the prompts."""
        self._next.sub_(self._slot - self._width)
        self._slot.fill_(self._width)


def decode_layer(
    hidden: Tensor,
    weights: tuple[Tensor, ...],
    eps: float,
    turn: list[Tensor],
    allowed: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
) -> Tensor:
    """A Llama layer at one new position of B sequences. Written out because compiled it is fifteen kernels, not fifty.

    Args:
        hidden: `(B, E)`.
        weights: see `_weights`.
        turn: cosines and sines of the rotary embedding, `(B, D)` each.
        allowed: `(B, L)` the columns of the cache to attend to.
        slot: `(1,)` the column of this position.
        keys, values: the layer's cache, `(B, H, L, D)`, written to.

    Returns:
        `(B, E)`.
    """
    norm, query, key, value, out, second_norm, gate, up, down = weights
    rows, heads, _, width = keys.shape

    def rotated(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = (part[:, None, None] for part in turn)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    x = F.rms_norm(hidden, hidden.shape[1:], norm, eps)
    keys.index_copy_(2, slot, rotated(F.linear(x, key).view(rows, heads, 1, width)))
    values.index_copy_(2, slot, F.linear(x, value).view(rows, heads, 1, width))
    queries = rotated(F.linear(x, query).view(rows, heads, -1, width))  # those that share a key
    scores = (queries @ keys.transpose(2, 3)) * width**-0.5
    shares = scores.masked_fill(~allowed[:, None, None], -torch.inf).softmax(dim=-1)
    hidden = hidden + F.linear((shares @ values).view(rows, -1), out)
    x = F.rms_norm(hidden, hidden.shape[1:], second_norm, eps)
    return hidden + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def _weights(layer: Any) -> tuple[Tensor, ...]:
    attention, mlp = layer.self_attn, layer.mlp
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    return (
        layer.input_layernorm.weight,
        *(projection.weight for projection in projections),
        layer.post_attention_layernorm.weight,
        *(projection.weight for projection in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
    )


def _advance_side_by_side(sides: list[_Side], token: Tensor) -> None:
    """Both models at once where there are streams: neither fills a GPU at this size."""
    if len(sides) == 1 or token.device.type != "cuda":
        for side in sides:
            side.advance(token)
        return
    main, other = torch.cuda.current_stream(), _second_stream()
    other.wait_stream(main)
    with torch.cuda.stream(other):
        sides[1].advance(token)
    sides[0].advance(token)
    main.wait_stream(other)


_streams: list[Any] = []


def _second_stream() -> Any:
    if not _streams:
        _streams.append(torch.cuda.Stream())
    return _streams[0]


def _as_samples(prompts: Sequence[Sequence[int]], tokens: Tensor, numbers: Tensor, stop: int) -> Samples:
    is_stop = (tokens == stop).long()
    mask = (is_stop.cumsum(dim=1) - is_stop == 0).long()  # up to the first stop, which belongs to the sequence
    real = mask.bool()
    alpha, logprobs_q, logprobs_theta, logprobs_t, kl_theta, kl_t = numbers.masked_fill(~real, 0.0)
    width, device = max(map(len, prompts)), tokens.device
    padded = [[stop] * (width - len(row)) + list(row) for row in prompts]
    kept = [[0] * (width - len(row)) + [1] * len(row) for row in prompts]
    batch = RolloutBatch(
        prompt_ids=torch.tensor(padded, device=device),
        prompt_mask=torch.tensor(kept, device=device),
        completion_ids=tokens.masked_fill(~real, stop),
        completion_mask=mask,
        weight_version=torch.full((len(prompts),), -1, device=device),
        columns={
            "alpha": alpha,
            "logprobs_q": logprobs_q,
            "logprobs_theta": logprobs_theta,
            "logprobs_t": logprobs_t,
            "importance_weights": (logprobs_theta - logprobs_q).exp().masked_fill(~real, 0.0),
        },
    )
    return Samples(batch, kl_theta, kl_t)
