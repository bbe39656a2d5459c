"""What SGLang's answers hold, as arrays.

Lists come as `[log-probability, token id, text or null]` triples, one list per position. Newer versions send them as
two base64 arrays, float32 and int32, `(positions, k)`, where `BINARY_LISTS` asks for that. Either form is read, for the
server may fall back to the first.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np

from dual_rollout.engine import Drafts, TokenIds
from dual_rollout.exceptions import EngineProtocolError
from dual_rollout.functional.top_k import TopK
from dual_rollout.servers.http import shown
from dual_rollout.servers.parsing import AnswerParser, ScoredText

BINARY_LISTS = {"return_flat_raw_output_top_logprobs": True, "return_flat_raw_top_logprobs_b64": True}
BINARY_PROMPT_LISTS = {"return_flat_raw_top_logprobs": True, **BINARY_LISTS}  # and those of the prompt's tokens
_ROUNDING = 1e-3  # nats

Rows = list[Any]
"""One list of triples per position."""
Lists = tuple[np.ndarray, np.ndarray]
"""Token ids and log-probabilities; both `(R, K)` where they are of lists."""


class SGLangParser(AnswerParser):
    """Reads what /generate answers; raises `EngineProtocolError` where it cannot be right."""

    def meta_info(self, answer: Any, prompt: TokenIds, is_to_it: Callable[[Any], bool]) -> Mapping[str, Any]:
        """What one answer says of what was generated after `prompt`; `is_to_it` knows the request by its id."""
        meta = answer.get("meta_info") if isinstance(answer, dict) else None
        if not isinstance(meta, dict):
            raise EngineProtocolError("an answer has no meta_info", url=self._url)
        if not is_to_it(meta.get("id")):
            raise self.invalid(f"an answer to another request ({shown(meta.get('id'))})")
        counted = meta.get("prompt_tokens")
        if isinstance(counted, int) and counted != len(prompt):
            raise self.invalid(f"an answer to {counted} prompt tokens instead of {len(prompt)}")
        finish = meta.get("finish_reason")
        if isinstance(finish, dict) and finish.get("type") == "abort":
            raise EngineProtocolError(f"the server aborted a request: {shown(finish.get('message'))}", url=self._url)
        return meta

    def sampled(self, meta: Mapping[str, Any], at_most: int) -> Lists:
        """The tokens that were generated, and their log-probabilities, both `(T,)`."""
        ids, logprobs = self._triples([self._output_rows(meta, "output_token_logprobs", at_most)])
        finish = meta.get("finish_reason")
        if ids.shape[1] < at_most and not (isinstance(finish, dict) and finish.get("type") == "stop"):
            raise self.invalid(f"{ids.shape[1]} tokens instead of {at_most}")
        return ids[0], logprobs[0]

    def drafts(self, metas: Sequence[Mapping[str, Any]], lengths: Sequence[int], k: int) -> Drafts:
        """The tokens of each, at most `lengths[i]`, and the lists at all of them, which must agree with them."""
        sampled = [self.sampled(meta, length) for meta, length in zip(metas, lengths, strict=True)]
        ids, logprobs = self._checked(
            [self._output_lists(meta, length) for meta, length in zip(metas, lengths, strict=True)]
        )
        own, own_logprobs = (np.concatenate(arrays)[:, None] for arrays in zip(*sampled, strict=True))
        wrong = ((ids == own) & (np.abs(logprobs - own_logprobs) > _ROUNDING)).any(axis=1)
        if wrong.any():
            raise self.invalid(f"a list that disagrees with the token sampled from it, {own[wrong.argmax(), 0]}")
        return Drafts([tokens for tokens, _ in sampled], self._top_k(ids, logprobs, k))

    def next_lists(self, metas: Sequence[Mapping[str, Any]], k: int) -> TopK:
        """The list at the one token that each generated."""
        return self._top_k(*self._checked([self._output_lists(meta, 1) for meta in metas]), k)

    def scored_lists(
        self, metas: Sequence[Mapping[str, Any]], texts: Sequence[TokenIds], starts: Sequence[int], k: int
    ) -> TopK:
        """The lists at positions `starts[i]` to the last of each text, whose last token was not sent: the last list is
        that of the token which was generated instead."""
        parts = []
        for meta, text, start in zip(metas, texts, starts, strict=True):
            parts += [self._input_lists(meta, len(text) - start - 1), self._output_lists(meta, 1)]
        return self._top_k(*self._checked(parts), k)

    def named_values(self, meta: Mapping[str, Any], names: Sequence[int]) -> np.ndarray:
        """Log-probabilities of the tokens that a request named."""
        ids, logprobs = self._triples(self._output_rows(meta, "output_token_ids_logprobs", 1))
        if ids[0].tolist() != list(names):
            raise self.invalid("output_token_ids_logprobs that are not those of the named tokens")
        return self.named(logprobs[0])

    def scored_text(self, meta: Mapping[str, Any], token_ids: TokenIds, start: int) -> ScoredText:
        """Log-probabilities of a text's tokens from `start` on, and those of the most likely ones there.

        The row at logprob_start_len itself is always null. Older versions leave it out unless it is row 0, so rows are
        counted from the end.
        """
        count = len(token_ids) - start
        ids, own = self._triples([self._input_rows(meta, "input_token_logprobs", count)])
        _, top = self._checked([self._input_lists(meta, count)])
        # SGLang writes the last id of the vocabulary as 0 here.
        if any(got not in (asked, 0) for got, asked in zip(ids[0].tolist(), token_ids[start:], strict=True)):
            raise self.invalid("input_token_logprobs that are not those of the prompt's tokens")
        return self.scores(own[0], top[:, 0])

    def is_binary(self, meta: Mapping[str, Any]) -> bool:
        """Whether the lists of both the prompt and the output are arrays."""
        return all(f"{side}_top_logprobs_shape" in meta for side in ("input", "output"))

    def _output_lists(self, meta: Mapping[str, Any], at_most: int) -> Rows | Lists:
        """The lists at the tokens generated, in the form in which they came."""
        if (arrays := self._arrays(meta, "output")) is None:
            return self._output_rows(meta, "output_top_logprobs", at_most)
        if not 1 <= len(arrays[0]) <= at_most:
            raise self.invalid(f"{len(arrays[0])} lists for {at_most} generated tokens")
        return arrays

    def _input_lists(self, meta: Mapping[str, Any], count: int) -> Rows | Lists:
        """The lists at the last `count` tokens of the prompt, in the form in which they came."""
        if (arrays := self._arrays(meta, "input")) is None:
            return self._input_rows(meta, "input_top_logprobs", count)
        ids, logprobs = arrays
        if len(ids) < count:
            raise self.invalid(f"{len(ids)} lists for {count} prompt tokens")
        return ids[len(ids) - count :], logprobs[len(ids) - count :]

    def _arrays(self, meta: Mapping[str, Any], side: str) -> Lists | None:
        """The lists of one side from its binary fields, without the null rows before them; None if it has none."""
        field = f"{side}_top_logprobs"
        if (shape := meta.get(f"{field}_shape")) is None:
            return None
        rows, width = shape
        ids, logprobs = (
            self._array(meta, f"{field}_{name}_flat_b64", dtype).reshape(rows, width)
            for name, dtype in (("idx", "int32"), ("val", "float32"))
        )
        return ids, logprobs

    def _array(self, meta: Mapping[str, Any], field: str, dtype: str) -> np.ndarray:
        if (said := meta[f"{field}_dtype"]) != dtype:
            raise self.invalid(f"{field} of {shown(said)} instead of {dtype}")
        return np.frombuffer(base64.b64decode(meta[field], validate=True), np.dtype(dtype).newbyteorder("<"))

    def _output_rows(self, meta: Mapping[str, Any], name: str, at_most: int) -> list[Any]:
        """What `name` holds for the tokens generated."""
        rows = meta.get(name)
        if not isinstance(rows, list) or not 1 <= len(rows) <= at_most:
            raise EngineProtocolError(f"meta_info has no {name} for {at_most} generated tokens", url=self._url)
        return rows

    def _input_rows(self, meta: Mapping[str, Any], name: str, count: int) -> list[Any]:
        """What `name` holds for the last `count` tokens of the prompt."""
        rows = meta.get(name)
        if not isinstance(rows, list) or len(rows) < count:
            raise EngineProtocolError(f"meta_info has no {name} for {count} prompt tokens", url=self._url)
        return rows[len(rows) - count :]

    def _checked(self, parts: Sequence[Rows | Lists]) -> Lists:
        """All lists, one after the other; parsed in bulk, the hot spot of the client."""
        found = []
        for form, group in groupby(parts, type):
            if form is list:
                if rows := list(chain.from_iterable(group)):
                    found.append(self._triples(rows))
            else:
                ids, logprobs = map(np.concatenate, zip(*group, strict=True))
                found.append((self.ids(ids), self.logprobs(logprobs)))
        ids, logprobs = map(np.concatenate, zip(*found, strict=True))
        return ids, logprobs

    def _triples(self, rows: Rows) -> Lists:
        """Lists of K triples as token ids and log-probabilities, both `(len(rows), K)`."""
        (width,) = {len(row) for row in rows}
        values, tokens, _ = zip(*chain.from_iterable(rows), strict=True)
        return self.ids(tokens).reshape(-1, width), self.logprobs(values).reshape(-1, width)

    def _top_k(self, ids: np.ndarray, logprobs: np.ndarray, k: int) -> TopK:
        if ids.shape[1] != k:
            raise self.invalid(f"a list of {ids.shape[1]} tokens, not {k}")
        return self.lists(ids.ravel(), logprobs.ravel(), np.full(len(ids), k), k)
