"""What the decoding loops ask of a server."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dual_rollout.types import TopK

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server says of the model it serves.

    Attributes:
        model: the name to use in requests.
        root: path or hub name of the weights, where the server tells; the default tokenizer.
        max_model_len: context length in tokens, where the server tells.
    """

    model: str
    root: str | None
    max_model_len: int | None


class Engine(Protocol):
    """One model behind a server. All methods raise the errors of `dual_rollout.exceptions`."""

    url: str

    async def describe(self) -> EngineInfo:
        """The served model; asked once, then remembered."""
        ...

    async def next_top_k(self, prompts: Sequence[TokenIds], k: int, temperature: float = 1.0) -> TopK:
        """The k most likely next tokens after each of B prompts, in one request; at most k per row."""
        ...

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Log-probabilities of named next tokens: for each prompt an array as long as its `token_ids`."""
        ...

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities, at temperature 1, of the tokens of one text from position `start` on.

        Returns `(own, top)`, both `(len(token_ids) - start,)` float64: the token's own log-probability given what
        precedes it, and that of the most likely token there.
        """
        ...

    async def draw_excluding(self, prompt: TokenIds, excluded: TokenIds, temperature: float, seed: int) -> int:
        """One next token drawn from the model, where `excluded` tokens are made as unlikely as the server can.

        The caller rejects an excluded token and draws again with another seed; the law stays exact even where a
        server ignores the exclusion.
        """
        ...

    async def reload_weights(self, path: str) -> None:
        """Load the weights in folder `path` (safetensors), then drop the prefix cache."""
        ...
