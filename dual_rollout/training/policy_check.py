"""Whether π_θ's server serves the policy that the trainer has, before the first token of a rollout and after its last.

Weights may fail to arrive in many ways: another base model under an adapter, a wrapper that changes names, a second
trainer on the same server. All of them show in the numbers, so the numbers are compared: log π_θ of a few fixed texts,
the server's and the trainer's own in evaluation mode.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dual_rollout.exceptions import WeightSyncError
from dual_rollout.servers import Engine
from dual_rollout.training.processes import fail_together

BOUNDS = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
"""Nats per token that log π_θ may differ by on average, for the coarser number format of both sides.

Measured with SmolLM2-135M: both in float32 1e-5, one in float16 0.007, one in bfloat16 0.06; one with noise of 3% on
all weights 0.26.
"""
QUANTISED_BOUND = 1.0

LIKELY_REASONS = (
    "the server was started from another model than the trainer, or holds other full weights under the adapter "
    "(restart it from the trainer's model, or set dual_weight_sync=disk); another trainer gives it weights (give each "
    "its own server); it is quantised or computes otherwise, which makes every weight π_θ/q* wrong by that much (if "
    "that is wanted, set dual_policy_check_bound)"
)

TEXTS = ("The capital of France is Paris, on the Seine.", "def add(a, b):\n    return a + b")
_LONGEST = 24  # tokens of a text


@dataclass(frozen=True, slots=True)
class Answer:
    """Of one server: the name and the number format of its weights, and log π_θ of each text's tokens but the first."""

    url: str
    version: str | None
    dtype: str | None
    logprobs: list[np.ndarray]


class PolicyCheck:
    """The comparison, for one rollout: the trainer's side is computed once, each server asked whenever it is run.

    Every process makes one, and runs it at the same time as the others; the main process alone asks.

    Attributes:
        difference: of log π_θ, nats per token, at the server where it was largest so far; NaN in all processes but the
            main one.
        seconds: that it took so far.

    Args:
        owner: the version that this run gave the server's weights; None where it did not name them.
        bound: nats; by the number formats (`BOUNDS`) when None.
        reasons: why a server may have other weights, and what to do, for the message.
    """

    def __init__(
        self,
        trainer: Any,
        tokenizer: Any,
        *,
        owner: str | None,
        bound: float | None,
        reasons: str = LIKELY_REASONS,
    ):
        self.difference, started = math.nan, time.perf_counter()
        self._is_main = trainer.accelerator.is_main_process
        self._owner, self._bound, self._reasons = owner, bound, reasons
        self._texts = fixed_texts(tokenizer, trainer.model)
        self._dtype = number_format(trainer)
        self._ours = trainer_logprobs(trainer.model, self._texts)
        self.seconds = time.perf_counter() - started

    def run(self, ask_all: Callable[[Callable[[Engine], Awaitable[Answer]]], list[Answer]], when: str) -> None:
        """Ask all of π_θ's servers and compare.

        Args:
            ask_all: gives the answers of each server in use.
            when: for the message.

        Raises:
            WeightSyncError: a server has other weights.
            EngineError: none answers.
        """
        started = time.perf_counter()
        with fail_together():
            if self._is_main:
                found = [self._difference(answer, when) for answer in ask_all(self._ask)]
                self.difference = float(np.nanmax([self.difference, *found]))
        self.seconds += time.perf_counter() - started

    def log(self, metrics: Any) -> None:
        """Add the figures to a trainer's metrics, lists by name."""
        metrics["sampling/policy_check"].append(self.difference)
        metrics["perf/policy_check_s"].append(self.seconds)

    async def _ask(self, engine: Engine) -> Answer:
        # One text at a time: some vLLM versions die of several with prompt_logprobs.
        logprobs = [(await engine.score(text, 1))[0] for text in self._texts]
        return Answer(engine.url, await engine.weight_version(), await engine.dtype(), logprobs)

    def _difference(self, answer: Answer, when: str) -> float:
        version = answer.version
        if self._owner is not None and version not in (self._owner, None, "default"):
            raise WeightSyncError(
                f"{answer.url} has the weights {version!r} {when}, and not {self._owner!r}, which this run gave it: "
                "another run uses the server. Give each trainer a π_θ server of its own"
            )
        difference = float(np.abs(np.concatenate(answer.logprobs) - np.concatenate(self._ours)).mean())
        bound = self._bound or bound_for(self._dtype, answer.dtype)
        if difference <= bound:
            return difference
        raise WeightSyncError(
            f"{answer.url} does not serve the trainer's policy {when}: log π_θ of fixed texts differs by "
            f"{difference:.3g} nats per token, and rounding explains {bound:g} (the trainer computes in {self._dtype}, "
            f"the server in {answer.dtype or 'a format that it does not say'}; its weights are named "
            f"{version!r}). Likely reasons: {self._reasons}"
        )


def bound_for(trainer: str, server: str | None) -> float:
    """Nats per token that rounding explains; a server that does not say its format may be in bfloat16."""
    formats = (trainer, server or "bfloat16")
    return max(BOUNDS.get(name, QUANTISED_BOUND) for name in formats)


def fixed_texts(tokenizer: Any, model: Any) -> list[list[int]]:
    """`TEXTS` in the model's tokens; where an adapter trains single tokens, also one with these in it."""
    size = model.config.get_text_config().vocab_size
    texts = [tokenizer.encode(text, add_special_tokens=False)[:_LONGEST] for text in TEXTS]
    # Each before an ordinary token, whose probability shows its embedding.
    trained = _trained_tokens(model)[: _LONGEST // 2]
    texts.append([token for pair in zip(trained, itertools.cycle(texts[0])) for token in pair])
    texts = [[token for token in text if token < size] for text in texts]
    return [text for text in texts if len(text) > 1] or [list(range(1, min(size, _LONGEST)))]


def _trained_tokens(model: Any) -> list[int]:
    found: set[int] = set()
    for config in getattr(model, "peft_config", {}).values():
        chosen = getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None) or []
        for tokens in chosen.values() if isinstance(chosen, dict) else [chosen]:
            found.update(tokens)
    return sorted(found)


def trainer_logprobs(model: Any, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """log π of each text's tokens but the first, in evaluation mode; of a sharded model in all processes at once."""
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(text) for text in texts], batch_first=True).to(device)
    mask = torch.nn.utils.rnn.pad_sequence(
        [torch.ones(len(text), dtype=torch.long) for text in texts], batch_first=True
    )
    with torch.no_grad(), evaluating(model):
        logits = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits
    logps = logits[:, :-1].float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return [row[: len(text) - 1].double().cpu().numpy() for row, text in zip(logps, texts, strict=True)]


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Without dropout; afterwards each module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def has_dropout(model: torch.nn.Module) -> bool:
    """Whether the model in training mode may drop something at random."""
    from torch.nn.modules.dropout import _DropoutNd

    if any(isinstance(module, _DropoutNd) and module.p > 0 for module in model.modules()):
        return True
    config = getattr(model, "config", None)
    chosen = config.get_text_config().to_dict() if config is not None else {}
    rates = (value for name, value in chosen.items() if "dropout" in name or name.endswith("pdrop"))
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def number_format(trainer: Any) -> str:
    """What the trainer computes log π_θ in: autocast's format, or the model's, or that it is quantised."""
    mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    dtypes = {parameter.dtype for parameter in trainer.model.parameters() if parameter.is_floating_point()}
    if getattr(trainer.model, "is_quantized", False):
        return "quantised"
    names = [mixed or "float32", *(str(dtype).removeprefix("torch.") for dtype in dtypes)]
    return max(names, key=lambda name: BOUNDS.get(name, QUANTISED_BOUND))
