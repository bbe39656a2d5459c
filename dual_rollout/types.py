"""Plain data that crosses the layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import numpy as np

from dual_rollout.record import SequenceRecord

if TYPE_CHECKING:
    from dual_rollout.config import AlphaRule

ChatMessages = Sequence[Mapping[str, str]]
Prompt = str | ChatMessages | Sequence[int]
"""A raw string, chat messages (rendered with the model's own chat template), or token ids."""

FinishReason = Literal["stop", "length"]

Role = Literal["theta", "t"]
"""What a server's model is: the policy π_θ or the target π_t."""

NO_TOKEN = -1
"""Padding in arrays of token ids."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The k most likely next tokens at B positions.

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

    @property
    def lengths(self) -> np.ndarray:
        """`(B,)` tokens of each row."""
        return (self.token_ids != NO_TOKEN).sum(axis=1)


class CallOptions(TypedDict, total=False):
    """Options of one call of a coordinator's `generate_*`.

    Attributes:
        max_tokens: tokens per sequence at most (256).
        temperature, seed, alpha_rule: instead of the config's, where not None.
        stop_token_ids: stop at these too, besides EOS.
        eos_token_ids: what EOS is; what the tokenizer and the generation config of π_θ's model say when None, as far
            as they are on this machine.
        return_diagnostics: fill `GenerationOutput.diagnostics`.
    """

    max_tokens: int
    temperature: float | None
    seed: int | None
    alpha_rule: AlphaRule | None
    stop_token_ids: Collection[int]
    eos_token_ids: Collection[int] | None
    return_diagnostics: bool


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sequence to draw.

    Attributes:
        index: names the sequence; its random stream is that of (seed, index), as in a batch at that position.
        prompt: what π_θ sees.
        t_prompt: what π_t sees instead, if not the same.
        target: which π_t: a name in `CoordinatorConfig.targets`, None for the one at `t_url`, or "none" for no target:
            plain generation from π_θ.
        max_tokens, seed: of this sequence; those of the call when None.
    """

    index: int
    prompt: Prompt
    t_prompt: Prompt | None = None
    target: str | None = None
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(slots=True)
class GenerationOutput:
    """One sequence drawn from q*, with what the policy update needs: a view of its `SequenceRecord`.

    Attributes:
        prompt: the prompt as given.
        prompt_token_ids: the ids π_θ saw.
        record: the tokens and their numbers. Its columns are also attributes here: `generated_tokens`, `alpha_history`,
            `logprobs_q`, `logprobs_theta`, `logprobs_t`, `importance_weights`, `without_target`, `weight_versions`,
            `draft_tokens`, `accepted_tokens`.
        generated_text: decoded without special tokens; None when no tokenizer could be loaded.
        finish_reason: "stop" (a stop token) or "length" (`max_tokens`); None when `error` is set.
        error: what went wrong with this prompt alone, or None. Tokens generated before the fault are kept.
    """

    prompt: Prompt
    prompt_token_ids: list[int]
    record: SequenceRecord = field(default_factory=SequenceRecord)
    generated_text: str | None = None
    finish_reason: FinishReason | None = None
    error: str | None = None

    @property
    def generated_tokens(self) -> list[int]:
        return self.record.token_ids

    @property
    def alpha_history(self) -> list[float]:
        return self.record.alpha

    @property
    def diagnostics(self) -> dict[str, list[float] | float]:
        """The record's diagnostics, with the mean and the largest of each as `<name>_mean` and `<name>_max`.

        Both leave out tokens for which a diagnostic is not known (NaN), as those without a target.
        """
        summary: dict[str, list[float] | float] = {}
        for name, values in self.record.diagnostics.items():
            known = np.array(values)[~np.isnan(values)]
            summary[name] = values
            summary[f"{name}_mean"] = float(known.mean()) if len(known) else math.nan
            summary[f"{name}_max"] = float(known.max()) if len(known) else math.nan
        return summary

    def __getattr__(self, name: str) -> Any:
        if name in SequenceRecord.__slots__ or name in ("importance_weights", "weight_version"):
            return getattr(self.record, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class StreamChunk:
    """One token of a streamed generation.

    `text` may be empty: bytes of a character that is not complete yet are held back until it is.
    `importance_weight` is NaN where log π_θ of the token has to be fetched afterwards, because only π_t listed it, and
    `logprob_q` where it lies outside both lists; the finished output has both.
    """

    token_id: int
    text: str
    alpha: float
    logprob_q: float
    importance_weight: float
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class TargetModel:
    """The target that rows have which name none.

    Attributes:
        model: its name; on a native server also a folder, or an adapter's name.
        gets_policys_weights: whether full weights that π_θ's server is given are this model's too.
    """

    model: str
    gets_policys_weights: bool
