"""Prompts of one coordinator as token ids: its tokenizer, what servers have room for, and where sequences end."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dual_rollout.config import CoordinatorConfig
from dual_rollout.engine import EngineInfo
from dual_rollout.stop_tokens import stop_token_ids
from dual_rollout.text import encode_prompt, is_text, load_tokenizer, names_special_token
from dual_rollout.types import Prompt

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class PromptStats:
    """Counts over a coordinator's life.

    Attributes:
        truncated_prompts: prompts that lost tokens at their beginning (`long_prompts`).
        special_names: prompts whose text named a special token that was read as plain characters
            (`parse_special_tokens`).
    """

    truncated_prompts: int = 0
    special_names: int = 0


class PromptEncoder:
    """Tokenises, and checks that there is room.

    Attributes:
        tokenizer: the one given, or that of the config or of π_θ's model once it was needed; None where there is none.
    """

    def __init__(self, config: CoordinatorConfig, tokenizer: Any, stats: PromptStats):
        self.tokenizer = tokenizer
        self._config = config
        self._stats = stats
        self._sought = False

    def find_tokenizer(self, model: EngineInfo, *, needed: bool) -> None:
        """Load the configured tokenizer, or else the one of π_θ's model; that is downloaded only where needed.

        Raises:
            ValueError: there is none, and it is needed or configured.
        """
        if self.tokenizer is not None or (self._sought and not needed):
            return
        self._sought = True
        name = self._config.tokenizer or model.root or model.model
        wanted = needed or self._config.tokenizer is not None
        try:
            self.tokenizer = load_tokenizer(name, local_files_only=not wanted)
        except Exception as error:  # of a damaged file the tokenizers library raises just that
            if wanted:
                raise ValueError(
                    f"no tokenizer found at {name!r}, set tokenizer to its name or path: {error}"
                ) from error
            logger.warning(
                "no tokenizer found at %r: nothing is decoded and no EOS is known (set tokenizer, or pass "
                "stop_token_ids)",
                name,
            )

    def stop_ids(self, given: Collection[int], model: EngineInfo, *, ignore_eos: bool) -> frozenset[int]:
        """The stop ids of a call, with the EOS ids of the tokenizer and of π_θ's model unless they are ignored."""
        stops = frozenset(given)
        if self.tokenizer is not None and not ignore_eos:
            stops |= stop_token_ids(self.tokenizer, model.root)
        return stops

    def encode(self, prompt: Prompt, max_tokens: int, readers: Mapping[str, EngineInfo | None]) -> list[int]:
        """Token ids of a prompt that the servers of its `readers`, by their models' names, have room for.

        Raises:
            ValueError: a prompt that cannot be encoded, or is too long (`long_prompts`).
        """
        parse = self._config.parse_special_tokens
        ids = encode_prompt(prompt, self.tokenizer, parse_special_tokens=parse)
        if not parse and is_text(prompt) and names_special_token(prompt, self.tokenizer):
            if self._stats.special_names == 0:
                logger.warning(
                    "the text of a prompt holds the name of a special token, which is read as plain characters; where "
                    "prompts are rendered templates, set parse_special_tokens. Prompt: %.80r",
                    prompt,
                )
            self._stats.special_names += 1
        return self._fit(ids, max_tokens, readers)

    def _fit(self, context: list[int], max_tokens: int, readers: Mapping[str, EngineInfo | None]) -> list[int]:
        """What of a prompt there is room for: all of it, unless the config allows less."""
        fitted = context
        for name, info in readers.items():
            if info is None or info.max_model_len is None:
                continue
            room = info.max_model_len - max_tokens - 1  # a server scores a text by generating one token more
            if len(fitted) <= room:
                continue
            if self._config.long_prompts == "refuse" or room < 1:
                raise ValueError(
                    f"{name} sees a prompt of {len(context)} tokens; with max_tokens={max_tokens} and one more for "
                    f"scoring that exceeds its context of {info.max_model_len}. Shorten the prompt, lower max_tokens, "
                    'raise --max-model-len, or set long_prompts to "truncate_left".'
                )
            fitted = fitted[-room:]
        if len(fitted) < len(context):
            if self._stats.truncated_prompts == 0:
                logger.warning(
                    "a prompt of %d tokens is cut to its last %d, for long_prompts is truncate_left",
                    len(context),
                    len(fitted),
                )
            self._stats.truncated_prompts += 1
        return fitted
