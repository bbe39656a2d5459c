"""What vLLM's answers hold, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from dual_rollout.engine import Drafts, TokenIds
from dual_rollout.exceptions import EngineProtocolError
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.parsing import AnswerParser

_KEY_PREFIX = "token_id:"
_ROUNDING = 1e-3  # nats


class CompletionParser(AnswerParser):
    """Reads completions and scored prompts; raises `EngineProtocolError` where they cannot be right."""

    def choices(self, answer: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != count:
            raise EngineProtocolError(f"expected {count} choices in the answer", url=self._url)
        choices.sort(key=lambda choice: choice["index"])
        if [choice["index"] for choice in choices] != list(range(count)):
            raise EngineProtocolError("the choices in the answer are not numbered 0, 1, 2, ...", url=self._url)
        if any(choice.get("finish_reason") == "abort" for choice in choices):
            raise EngineProtocolError("the server aborted a request, as it does on /pause", url=self._url)
        return choices

    def sampled(self, choice: Mapping[str, Any], at_most: int) -> tuple[list[str], list[dict[str, float]]]:
        """The tokens of a choice, as they are written, and the list at each of them, which must hold it."""
        logprobs = choice["logprobs"]
        keys, rows = logprobs["tokens"], logprobs["top_logprobs"]
        if not 1 <= len(keys) <= at_most or (len(keys) < at_most and choice.get("finish_reason") != "stop"):
            raise self.invalid(f"{len(keys)} tokens instead of {at_most}")
        for key, own, row in zip(keys, logprobs["token_logprobs"], rows, strict=True):
            if row[key] != own:
                raise self.invalid(f"a list that disagrees with the token sampled from it, {key}")
        return keys, rows

    def drafts(self, choices: Sequence[Mapping[str, Any]], at_most: int, k: int, *, greedy: bool = False) -> Drafts:
        """The tokens of each choice, and the lists at all of them."""
        drafts, rows, own = [], [], []
        for choice in choices:
            keys, sampled_from = self.sampled(choice, at_most)
            drafts.append(self.ids(token_ids_of(keys)))
            for key, row in zip(keys, sampled_from, strict=True):
                own.append(row[key])
                rows.append(without_sampled(row, key, k))
        lists = self.pack(rows, k)
        if greedy and (np.array(own) < lists.logprobs.max(axis=1) - _ROUNDING).any():
            raise self.invalid("a list that holds likelier tokens than the one sampled at temperature 0")
        return Drafts(drafts, lists)

    def prompt_rows(self, choice: Mapping[str, Any], text: TokenIds) -> list[Any]:
        rows = choice.get("prompt_logprobs")
        if not isinstance(rows, list) or len(rows) != len(text):
            raise self.invalid("no prompt_logprobs, one row per prompt token")
        return rows

    def scored(self, rows: Sequence[Any], tokens: TokenIds, k: int) -> TopK:
        """Rows of prompt_logprobs as k-lists; each must hold the prompt's own token."""
        lists = []
        for row, token in zip(rows, tokens, strict=True):
            if str(token) not in row:
                raise self.invalid(f"prompt_logprobs without the prompt's own token {token}")
            entries = {f"{_KEY_PREFIX}{key}": entry["logprob"] for key, entry in row.items()}
            lists.append(without_sampled(entries, f"{_KEY_PREFIX}{token}", k))
        return self.pack(lists, k)

    def named_values(self, names: Sequence[int], choices: Sequence[Mapping[str, Any]], *, known: bool) -> np.ndarray:
        """Log-probabilities of the tokens that a request named; `known`: the server was seen to report them."""
        _, (row,) = self.sampled(choices[0], 1)
        keys = [f"{_KEY_PREFIX}{token}" for token in names]
        if not all(key in row for key in keys):
            advice = "" if known else ': set missing="floor" or use a newer vLLM'
            raise self.invalid(f"no log-probabilities of some named tokens (logprob_token_ids){advice}")
        return self.named([row[key] for key in keys])

    def pack(self, rows: list[dict[str, float]], k: int) -> TopK:
        """Rows of `{"token_id:7": -0.3}` as arrays; parsed in bulk, the hot spot of the client."""
        lengths = np.fromiter(map(len, rows), dtype=np.int64, count=len(rows))
        keys = " ".join(chain.from_iterable(rows))
        if keys.count(_KEY_PREFIX) != lengths.sum():
            raise EngineProtocolError(
                "tokens are not written as token_id:N; the server does not honour return_tokens_as_token_ids",
                url=self._url,
            )
        ids = np.fromstring(keys.replace(_KEY_PREFIX, ""), dtype=np.int64, sep=" ")
        return self.lists(ids, list(chain.from_iterable(row.values() for row in rows)), lengths, k)


def without_sampled(row: dict[str, float], sampled: str, k: int) -> dict[str, float]:
    """A list without the token that happened to be sampled, where that is not one of the k: S must not depend on it."""
    return row if len(row) <= k else {key: value for key, value in row.items() if key != sampled}


def token_ids_of(keys: Sequence[str]) -> np.ndarray:
    return np.array([int(key.removeprefix(_KEY_PREFIX)) for key in keys], dtype=np.int64)
