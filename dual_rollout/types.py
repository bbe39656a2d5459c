"""Plain data that crosses the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | ChatMessages | Sequence[int]
"""A raw string, chat messages (rendered with the model's own chat template), or token ids."""

FinishReason = Literal["stop", "length"]

NO_TOKEN = -1
"""Padding in arrays of token ids."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The k most likely next tokens of B sequences.

    Attributes:
        token_ids: `(B, K)` int64 in no particular order, `NO_TOKEN` where a row has fewer than K.
        logprobs: `(B, K)` float64 in nats, `-inf` at padding.
        complete: `(B,)` bool, or one for all rows: whether a row lists every token that is possible there.
        vocab_size: tokens that the model has, where known.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    complete: np.ndarray | bool = False
    vocab_size: int | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to draw, for `generate_iter`.

    Attributes:
        index: names the sequence; its random stream is that of (seed, index), as in a batch at that position.
        prompt: what π_θ sees.
        t_prompt: what π_t sees instead, if not the same.
    """

    index: int
    prompt: Prompt
    t_prompt: Prompt | None = None


@dataclass(slots=True)
class GenerationOutput:
    """One sequence drawn from q*, with what the policy update needs. Lists hold one float per generated token.

    Attributes:
        prompt: the prompt as given.
        prompt_token_ids: the ids π_θ saw.
        generated_text: decoded without special tokens; None when no tokenizer could be loaded.
        generated_tokens: sampled ids, the stop token included when there was one.
        finish_reason: "stop" (a stop token) or "length" (`max_tokens`); None when `error` is set.
        alpha_history: α of every position, in [0, 1].
        logprobs_q: log q*(y), nats. This is the law y was really drawn from.
        logprobs_theta: log π_θ(y), nats, exact (never floored), at the requested temperature.
        logprobs_t: log π_t(y), nats; exact (never floored), at the requested temperature.
        importance_weights: π_θ(y) / q*(y). These three are NaN where `policy_logprobs` is False.
        without_target: whether a token was drawn from π_θ alone, because its prompt has no target, or because π_t's
            server was gone and `on_target_failure` is "policy". Then α = 0, log q* = log π_θ, the weight is exactly 1,
            and log π_t is NaN, as are the diagnostics that need it.
        weight_versions: the version of π_θ's weights that each token was sampled under, as the weight sync counts them:
            the trainer's global step; None before the first sync. All the same unless `allow_mixed_versions` is set.
        diagnostics: per-token lists and `<name>_mean`/`<name>_max` summaries, when asked for.
        error: what went wrong with this prompt alone, or None. Tokens generated before the fault are kept.
    """

    prompt: Prompt
    prompt_token_ids: list[int]
    generated_text: str | None = None
    generated_tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    alpha_history: list[float] = field(default_factory=list)
    logprobs_q: list[float] = field(default_factory=list)
    logprobs_theta: list[float] = field(default_factory=list)
    logprobs_t: list[float] = field(default_factory=list)
    importance_weights: list[float] = field(default_factory=list)
    without_target: list[bool] = field(default_factory=list)
    weight_versions: list[int | None] = field(default_factory=list)
    diagnostics: dict[str, list[float] | float] = field(default_factory=dict)
    error: str | None = None

    @property
    def weight_version(self) -> int | None:
        """The version of the whole: the oldest of its tokens'; None where one is not known, or there are none."""
        known = [version for version in self.weight_versions if version is not None]
        return min(known) if known and len(known) == len(self.weight_versions) else None


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One token of a streamed generation.

    `text` may be empty: bytes of a character that is not complete yet are held back until it is.
    `importance_weight` is NaN where log π_θ of the token has to be fetched afterwards, because only π_t listed it, and
    `logprob_q` where it lies outside both lists; the finished output has both. Without `policy_logprobs` no weight is
    known.
    """

    token_id: int
    text: str
    alpha: float
    logprob_q: float
    importance_weight: float
    finish_reason: FinishReason | None
