"""What may be asked of the route, and whether it can be answered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dual_rollout.vllm_routes import check_served, check_token_ids, is_int


@dataclass(frozen=True)
class Limits:
    """What a request must keep to; `names` are those of the model, `adapters` of what is loaded on top of it."""

    vocab_size: int
    max_logprobs: int
    max_model_len: int
    names: frozenset[str]
    adapters: frozenset[str]


@dataclass(frozen=True)
class Text:
    """One text of a request.

    Attributes:
        session: its name, unless it is asked for once.
        known: tokens of it that the session has; 0 begins one.
        token_ids: the others.
    """

    session: str | None
    known: int
    token_ids: list[int]


@dataclass(frozen=True)
class ListRequest:
    """The body of a request for lists.

    Attributes:
        model: the served name of the model or of an adapter.
        k: tokens of each list.
        temperature: as in vLLM's completions; 0 for log-probabilities at temperature 1.
        texts: `[session, known, token_ids]` each.
        ended: sessions that are not gone on with.
        request_id: comes back in the answer.
    """

    model: str
    k: int
    temperature: float
    texts: list[Text]
    ended: list[str]
    request_id: str | None

    @classmethod
    def from_json(cls, body: Any, limits: Limits) -> ListRequest:
        """Raises `ValueError` with the field to mend, `UnknownModelError` for a model that is not served."""
        try:
            texts = [Text(*text) for text in body["texts"]]
            made = cls(
                body["model"], body["k"], body["temperature"], texts, body.get("ended", []), body.get("request_id")
            )
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a request for lists ({type(error).__name__}: {error})") from error
        made._check(limits)
        return made

    def _check(self, limits: Limits) -> None:
        check_served(self.model, limits.names | limits.adapters)
        if not is_int(self.k) or not 1 <= self.k <= limits.max_logprobs:
            raise ValueError(f"k must be in [1, {limits.max_logprobs}] (--max-logprobs), got {self.k!r:.80}")
        _check_temperature(self.temperature)
        if not self.texts or not isinstance(self.ended, list):
            raise ValueError("texts must be a list of at least one, and ended a list")
        for text in self.texts:
            if not isinstance(text.session, str | None) or not is_int(text.known) or text.known < 0:
                raise ValueError(f"a text must be [session or null, known >= 0, token ids], got {text!r:.200}")
            _check_text(text.token_ids, text.known, limits)
        named = [text.session for text in self.texts if text.session is not None]
        if len(set(named)) < len(named):
            raise ValueError("a session may have one text in a request")


@dataclass(frozen=True)
class Draw:
    """A token that is drawn after a text, or log-probabilities of named tokens there.

    Attributes:
        token_ids: the text.
        seed: of the draw; None for any.
        excluded: tokens that are not drawn, as far as the engine can make them unlikely.
        named: tokens whose log-probabilities are wanted; none together with `excluded`, which may change them.
    """

    token_ids: list[int]
    seed: int | None
    excluded: list[int]
    named: list[int]


@dataclass(frozen=True)
class DrawRequest:
    """The body of a request for tokens.

    Attributes:
        model, temperature, request_id: as in `ListRequest`.
        draws: `[token_ids, seed, excluded, named]` each.
    """

    model: str
    temperature: float
    draws: list[Draw]
    request_id: str | None

    @classmethod
    def from_json(cls, body: Any, limits: Limits) -> DrawRequest:
        """Raises `ValueError` with the field to mend, `UnknownModelError` for a model that is not served."""
        try:
            draws = [Draw(*draw) for draw in body["draws"]]
            made = cls(body["model"], body["temperature"], draws, body.get("request_id"))
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a request for draws ({type(error).__name__}: {error})") from error
        made._check(limits)
        return made

    def _check(self, limits: Limits) -> None:
        check_served(self.model, limits.names | limits.adapters)
        _check_temperature(self.temperature)
        if not self.draws:
            raise ValueError("draws must be a list of at least one")
        for draw in self.draws:
            _check_text(draw.token_ids, 0, limits)
            if draw.seed is not None and not is_int(draw.seed):
                raise ValueError(f"a seed must be a whole number or null, got {draw.seed!r:.80}")
            for name, ids in (("excluded", draw.excluded), ("named", draw.named)):
                check_token_ids(name, ids, limits.vocab_size, may_be_empty=True)
            if draw.excluded and draw.named:
                raise ValueError("a draw may have excluded tokens or named ones")


def _check_temperature(temperature: Any) -> None:
    if isinstance(temperature, bool) or not isinstance(temperature, int | float):
        raise ValueError(f"temperature must be a number, got {temperature!r:.80}")


def _check_text(token_ids: Any, known: int, limits: Limits) -> None:
    """`token_ids` come after `known` others."""
    check_token_ids("a text", token_ids, limits.vocab_size, may_be_empty=False)
    if known + len(token_ids) >= limits.max_model_len:
        raise ValueError(
            f"a text of {known + len(token_ids)} tokens leaves no room for one more in the model's context of "
            f"{limits.max_model_len} (--max-model-len)"
        )
