"""Log-probabilities of named tokens along a text: what vLLM's `prompt_logprob_token_ids` takes, and what comes back.

vLLM up to 0.31 takes one list of names and scores all of it in every row. From 0.32 on it takes one list for each row.
Either refuses the other's form.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

from dual_rollout.engine import NamedRowsForm, TokenIds

NamesSent = list[list[int]] | list[int]


def requests_for(form: NamedRowsForm, names: Sequence[TokenIds], limit: int | None) -> list[NamesSent]:
    """The values of `prompt_logprob_token_ids` that together ask for `names`, one list for each of R rows.

    A request names at most `limit` tokens in a row, any number when None. At least one row has a name.
    """
    if form == "per row":
        longest = max(map(len, names))
        step = limit or longest
        return [[list(ids[i : i + step]) for ids in names] for i in range(0, longest, step)]
    union = sorted(set(chain.from_iterable(names)))
    step = limit or len(union)
    return [union[i : i + step] for i in range(0, len(union), step)]


def width(sent: NamesSent) -> int:
    """Columns of the answer to one request."""
    return max(len(ids) if isinstance(ids, list) else len(sent) for ids in sent)


def values_of(form: NamedRowsForm, names: Sequence[TokenIds], answers: Sequence[np.ndarray]) -> list[np.ndarray]:
    """For each row the values of its own names, from the answers `(R, width)` to all of `requests_for`."""
    values = np.hstack(answers)
    if form == "per row":  # a row's names fill its first columns; the rest is padding
        return [row[: len(ids)] for row, ids in zip(values, names, strict=True)]
    column = {token: i for i, token in enumerate(sorted(set(chain.from_iterable(names))))}
    return [row[[column[token] for token in ids]] for row, ids in zip(values, names, strict=True)]
