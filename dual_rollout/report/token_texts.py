"""The text of each token by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

PART_OF_A_CHARACTER = "‥"
"""Stands for a token that holds some bytes of a character; the token that completes it has the character."""

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_LONGEST_CHARACTER = 4  # bytes, and so tokens


class TokenTexts:
    """Numbers tokens with their texts, each of which is stored once.

    Args:
        tokenizer: a Hugging Face tokenizer.

    Attributes:
        texts, ids: by these numbers. One with a part of a character has several texts, and so several numbers.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.texts: list[str] = []
        self.ids: list[int] = []
        self._numbers: dict[tuple[int, str], int] = {}
        self._alone: dict[int, str] = {}
        # Some tokenizers drop a space at the beginning, so every token is decoded behind another one.
        self._anchor = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._skip = len(self._decode([]))

    def of(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """`(T,)` int64: the number of each token. Put together their texts are the text of the whole.

        Raises:
            ValueError: an id that the tokenizer refuses.
        """
        ids = [int(token) for token in token_ids]
        texts = [self._text(token) for token in ids]
        for end in range(len(texts)):
            if _BROKEN in texts[end]:
                self._complete(ids, texts, end)
        numbers = [self._number(*pair) for pair in zip(ids, texts, strict=True)]
        return np.array(numbers, dtype=np.int64)

    def _complete(self, ids: list[int], texts: list[str], end: int) -> None:
        """Give the token at `end` the character that it completes together with those before it, if it does."""
        for start in range(end - 1, max(end - _LONGEST_CHARACTER, -1), -1):
            if _BROKEN not in texts[start]:
                return
            joined = self._decode(ids[start : end + 1])[self._skip :]
            if _BROKEN not in joined:
                texts[end] = joined
                texts[start:end] = [PART_OF_A_CHARACTER] * (end - start)
                return

    def _text(self, token: int) -> str:
        if token not in self._alone:
            self._alone[token] = self._decode([token])[self._skip :] or f"⟨{token}⟩"  # one that has no text
        return self._alone[token]

    def _decode(self, ids: list[int]) -> str:
        decode = self._tokenizer.decode
        try:
            text = decode(self._anchor + ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        except Exception as error:  # tokenizers raise OverflowError, TypeError and what their authors chose
            raise ValueError(
                f"the tokenizer does not have the token {ids}: is --tokenizer of the same model?"
            ) from error
        return str(text)

    def _number(self, token: int, text: str) -> int:
        if (token, text) not in self._numbers:
            self._numbers[token, text] = len(self.texts)
            self.texts.append(text.replace(_BROKEN, PART_OF_A_CHARACTER))
            self.ids.append(token)
        return self._numbers[token, text]
