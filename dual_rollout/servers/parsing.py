"""What an answer must be like, whichever kind of server gives it, and asking again where it is not."""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from dual_rollout.exceptions import EngineProtocolError
from dual_rollout.functional.top_k import NO_TOKEN, TopK, filled, most_likely

logger = logging.getLogger(__name__)

A = TypeVar("A")
T = TypeVar("T")
Values = Sequence[Any] | np.ndarray
ScoredText = tuple[np.ndarray, np.ndarray]

MALFORMED = (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, RecursionError)
"""What reading an answer of another shape than promised raises."""

_RUN = f"dual-rollout-{secrets.token_hex(6)}-"
_numbers = itertools.count()
_REPEATS = 2
_PAUSE_S = 0.25
_LARGEST_ID = 2**31 - 1
_NEVER = -9999.0  # vLLM writes -inf so, SGLang as the least finite float
_ROUNDING = 1e-3  # nats above what cannot be exceeded, and mass above 1
_OPEN_MASS = 1e-4  # what a list of all that is possible may seem to leave open


def read_as(read: Callable[[A], T], answer: A, url: str) -> T:
    """What `read` makes of an answer, whose shape may be any.

    Raises:
        EngineProtocolError: it is another than `read` takes for granted.
    """
    try:
        return read(answer)
    except MALFORMED as error:
        what = f"gave an answer of another shape ({type(error).__name__}: {str(error)[:100]})"
        raise EngineProtocolError(what, url=url) from error


class RequestIds:
    """RequestIds for requests, which servers repeat in their answers: a proxy may give an earlier answer again."""

    def __init__(self) -> None:
        self._repeated: set[str] = set()  # by these routes

    def next(self) -> str:
        return f"{_RUN}{next(_numbers)}"

    def fit(self, route: str, name: Any, number: str) -> bool:
        """Whether an answer of that name may be to the request of that number; one that repeats none may be to any."""
        if isinstance(name, str) and name.endswith(number):
            self._repeated.add(route)
            return True
        return route not in self._repeated and not (isinstance(name, str) and _RUN in name)


class AnswerParser:
    """Turns what one server says into arrays, or raises `EngineProtocolError` where that cannot be right.

    Attributes:
        vocab_size: what token ids lie below; None where the server does not tell.
    """

    def __init__(self, url: str):
        self.vocab_size: int | None = None
        self._url = url

    def invalid(self, what: str) -> EngineProtocolError:
        return EngineProtocolError(f"gave {what}", url=self._url)

    def logprobs(self, values: Values) -> np.ndarray:
        """float64 of the same shape, `-inf` for what is impossible; of a flat list, or an array of any shape."""
        logprobs = np.array(values, dtype=np.float64)
        if logprobs.ndim != 1 and not isinstance(values, np.ndarray):
            raise self.invalid("lists where log-probabilities should be")
        if np.isnan(logprobs).any() or (logprobs > _ROUNDING).any():
            raise self.invalid("log-probabilities that are NaN or positive")
        return np.where(logprobs <= _NEVER, -np.inf, np.minimum(logprobs, 0.0))

    def ids(self, values: Values) -> np.ndarray:
        """int64 of the same shape."""
        ids = np.array(values, dtype=np.int64)
        if ids.size and not (ids.min() >= 0 and ids.max() <= (self.vocab_size or _LARGEST_ID + 1) - 1):
            raise self.invalid(f"token ids from {ids.min()} to {ids.max()}, vocabulary {self.vocab_size}")
        return ids

    def named(self, values: Values) -> np.ndarray:
        """Log-probabilities of different tokens of one position, or of several positions, one a row."""
        logprobs = self.logprobs(values)
        self._check_mass(logprobs)
        return logprobs

    def scores(self, own: Values, top: Values) -> ScoredText:
        """Log-probabilities of the tokens of a text, and of the most likely ones there."""
        own_logprobs, top_logprobs = self.logprobs(own), self.logprobs(top)
        if not (np.isfinite(top_logprobs).all() and (own_logprobs <= top_logprobs + _ROUNDING).all()):
            raise self.invalid(
                "log-probabilities of a text above those of the most likely tokens, which must be finite"
            )
        return own_logprobs, top_logprobs

    async def scores_twice(self, ask: Callable[[], Awaitable[ScoredText]]) -> ScoredText:
        """What `ask` gives, as `scores`; that a token of the text is impossible is believed if it is said twice."""
        own, top = await ask()
        for _ in range(_REPEATS + 1):
            possible = np.isfinite(own)
            if possible.all():
                return own, top
            own, top = await ask()
            if (np.isfinite(own) == possible).all():
                return own, top
        raise self.invalid("log-probabilities of a text that are -inf at another token each time")

    def lists(self, ids: Values, logprobs: Values, lengths: np.ndarray, k: int) -> TopK:
        """Lists of k tokens, one after the other in `ids` and `logprobs`, `lengths` `(R,)` says how many each.

        No list names a token twice or has more mass than 1. One of fewer than k possible tokens is right only if it
        holds all there is, which the size of the vocabulary tells where it is known, and the mass in any case. Of a
        longer one the k most likely are kept.
        """
        if not len(lengths) or lengths.min() == 0:
            raise self.invalid("an empty list of log-probabilities")
        values = self.logprobs(logprobs)
        # Impossible tokens are no candidates; some versions of vLLM also pad rows with them.
        names = np.where(values > -np.inf, np.array(ids, dtype=np.int64), 0)
        top = filled(self.ids(names), values, lengths)
        ordered = np.sort(top.token_ids, axis=1)
        if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != NO_TOKEN)).any():
            raise self.invalid("a list that names a token twice")
        mass = self._check_mass(top.logprobs)
        cut_off = self.vocab_size is not None and lengths < min(k, self.vocab_size)
        short = top.lengths < k
        if (cut_off | (short & (mass < 1 - _OPEN_MASS))).any():
            raise self.invalid(
                f"a list of fewer than {k} tokens that is not all there is. Is another client using "
                "logprob_token_ids on this server? That garbles the lists of requests in the same step"
            )
        if top.token_ids.shape[1] > k:
            top = most_likely(top, np.full(len(lengths), k))
        counts = top.lengths
        return replace(top, complete=(counts < k) | (counts == self.vocab_size), vocab_size=self.vocab_size)

    def _check_mass(self, logprobs: np.ndarray) -> np.ndarray:
        """The mass of each row."""
        mass = np.exp(logprobs).sum(axis=-1)
        if (mass > 1 + _ROUNDING).any():
            raise self.invalid("probabilities of different tokens that add up to more than 1")
        return mass
