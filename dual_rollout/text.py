"""Text in, text out: chat templates, tokenisation, stop ids and incremental decoding, once, on the client."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dual_rollout.types import Prompt

logger = logging.getLogger(__name__)


def load_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """The tokenizer of a model folder or hub name (imports transformers, hence late).

    Raises:
        OSError, ValueError: there is none under that name.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only)


def is_text(prompt: Prompt) -> bool:
    """Whether a prompt is a string or chat messages, which need a tokenizer."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def encode_prompt(prompt: Prompt, tokenizer: Any) -> list[int]:
    """Token ids of a prompt: chat messages through the model's own template, strings as they are, ids checked.

    Raises:
        ValueError: an empty prompt, wrong types, or text without a tokenizer or template.
    """
    if is_text(prompt):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer: set tokenizer to its name or path, or pass token ids")
        if isinstance(prompt, str):
            ids = tokenizer(prompt)["input_ids"]
        elif tokenizer.chat_template is None:
            raise ValueError("the prompt is a list of chat messages, but the tokenizer has no chat template")
        else:
            ids = _render_chat(prompt, tokenizer)
    else:
        if not isinstance(prompt, Sequence) or not all(map(_is_token_id, prompt)):
            raise ValueError("a prompt must be a string, a list of chat messages, or a list of token ids >= 0")
        ids = list(prompt)
    if not ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    return list(ids)


def stop_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokenizer's EOS and all of the model's generation config, where the model's folder has one."""
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    ids.update(_generation_config_eos(tokenizer.name_or_path))
    return frozenset(ids)


class IncrementalDecoder:
    """Text of a growing token list. Bytes of an unfinished character are held back until it is complete."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been handed out
        self._context = 0  # earlier ids decoded along, since some tokenizers drop a leading space

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that `token` completes; possibly empty. The `last` token brings out what is held back."""
        self._ids.append(token)
        before = self._decode(self._ids[self._context : self._shown])
        text = self._decode(self._ids[self._context :])
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and not last
        if unfinished or len(text) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)


def _render_chat(messages: Prompt, tokenizer: Any) -> list[int]:
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    except TemplateError as error:
        raise ValueError(f"the tokenizer's chat template does not take these messages: {error}") from error


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _generation_config_eos(model: str) -> list[int]:
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model,
            "generation_config.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        logger.info("no generation config for %s (%s): EOS from the tokenizer alone", model, error)
        return []
    if path is None:
        return []
    eos = json.loads(Path(path).read_text()).get("eos_token_id")
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
