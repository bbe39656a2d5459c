"""Find out by measuring how to decode fastest on these servers: the mode, with `decoding: auto`, and the grouping."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dual_rollout.config import CoordinatorConfig
from dual_rollout.engines.base import ScoringMethod

DEFAULT_DRAFT_TOKENS = 8
_FIRST_LENGTH, _OTHER_LENGTHS = 4, (8, 2)
_LOCKSTEP_ROUNDS, _BLOCK_ROUNDS = 6, 3  # of one measurement
_SETTLED_ROUNDS = 8, 32  # at first, and when the choice has stood for a while
_SIMPLER = 0.95  # an earlier choice this close to the fastest is preferred: short measurements err by as much
_HOPELESS = 0.4  # of the best so far: another way to score will not make up for this
_PROMISING = 0.85  # of the best so far: worth trying at other lengths


@dataclass(frozen=True, slots=True)
class Choice:
    """A way to decode: the mode, the number of groups that take turns, the longest draft and how it is scored."""

    mode: str
    groups: int
    num_draft_tokens: int = 1
    scoring: ScoringMethod = "prefixes"

    def __str__(self) -> str:
        drafts = f", {self.num_draft_tokens} draft tokens scored by {self.scoring}" if self.mode == "block" else ""
        return f"{self.mode}, {self.groups} group{'s' if self.groups > 1 else ''}{drafts}"


@dataclass(frozen=True, slots=True)
class Load:
    """What speed depends on: sequences in flight and tokens of context, each to a factor of two."""

    sequences: int
    context: int

    @classmethod
    def of(cls, sequences: int, context: int) -> Load:
        return cls(1 << max(sequences - 1, 0).bit_length(), max(64, 1 << max(context - 1, 0).bit_length()))

    def distance(self, other: Load) -> int:
        return abs(self.sequences.bit_length() - other.sequences.bit_length()) + abs(
            self.context.bit_length() - other.context.bit_length()
        )


class Tuner:
    """Tokens per second of each choice, measured while decoding, by load. Lives as long as its coordinator.

    At a load never seen, every choice is tried for a few rounds; near a load that is known, only its two best are
    compared again. Then the best is used, and measured on. Measuring costs nothing but the difference in speed: what
    is sampled meanwhile is as exact as ever.

    Attributes:
        scoring: the ways in which π_t's server can score drafts.
        chosen: what was found fastest at the latest load.
    """

    def __init__(self, scoring: tuple[ScoringMethod, ...] = ("prefixes",)) -> None:
        self.scoring = scoring
        self._rates: dict[Load, dict[Choice, float]] = {}
        self._measured: dict[tuple[Load, Choice], tuple[float, float]] = {}  # tokens and seconds, the recent ones most
        self._load: Load | None = None
        self._rounds = _SETTLED_ROUNDS[0]
        self.chosen: Choice | None = None

    def first(self, config: CoordinatorConfig) -> Choice:
        """For the round that reads the prompts."""
        if config.decoding == "block":
            return Choice("block", 1, config.num_draft_tokens or DEFAULT_DRAFT_TOKENS, self.scoring[0])
        return Choice("lockstep", 1)

    def choose(self, config: CoordinatorConfig, load: Load) -> tuple[Choice, int]:
        """What to do next, and for how many rounds."""
        rates = self._rates.setdefault(load, {})
        self._load = load
        for choice in self._worth_trying(config, load, rates):
            if choice not in rates:
                return choice, _LOCKSTEP_ROUNDS if choice.mode == "lockstep" else _BLOCK_ROUNDS
        best = max(rates.values())
        chosen = next(choice for choice, rate in rates.items() if rate >= _SIMPLER * best)
        self._rounds = min(2 * self._rounds, _SETTLED_ROUNDS[1]) if chosen == self.chosen else _SETTLED_ROUNDS[0]
        self.chosen = chosen
        return chosen, self._rounds

    def observe(self, choice: Choice, tokens: int, seconds: float) -> None:
        """Record what the last choice achieved."""
        assert self._load is not None
        before = self._measured.get((self._load, choice), (0.0, 0.0))
        tokens_seen, seconds_seen = 0.5 * before[0] + tokens, 0.5 * before[1] + seconds
        self._measured[self._load, choice] = tokens_seen, seconds_seen
        self._rates[self._load][choice] = tokens_seen / seconds_seen

    def report(self) -> dict[str, dict[str, float]]:
        """Measured tokens per second, by load and choice; the reason for what was chosen."""
        return {
            f"{load.sequences} sequences, {load.context} tokens": {str(c): round(r, 1) for c, r in rates.items()}
            for load, rates in self._rates.items()
        }

    def _worth_trying(self, config: CoordinatorConfig, load: Load, rates: dict[Choice, float]) -> Iterator[Choice]:
        """The choices to measure, in order. What comes later depends on what was measured of the earlier ones."""
        known = [other for other, others in self._rates.items() if other != load and len(others) > 1]
        if known:
            nearest = self._rates[min(known, key=load.distance)]
            yield from sorted(nearest, key=nearest.__getitem__, reverse=True)[:2]
            return
        groups = (1, 2) if load.sequences > 1 else (1,)
        if config.decoding != "block":
            yield from (Choice("lockstep", count) for count in groups)
            if config.decoding == "lockstep" or not can_block(config):
                return
        length = config.num_draft_tokens or (DEFAULT_DRAFT_TOKENS if config.decoding == "block" else _FIRST_LENGTH)
        for method in self.scoring:
            choice = Choice("block", groups[-1], length, method)
            yield choice
            if config.decoding == "auto" and rates[choice] < _HOPELESS * max(rates.values()):
                return
        fastest = max((choice for choice in rates if choice.mode == "block"), key=rates.__getitem__)
        if config.decoding == "block":
            yield replace(fastest, groups=1)
        elif config.num_draft_tokens is None and rates[fastest] > _PROMISING * max(rates.values()):
            yield from (replace(fastest, num_draft_tokens=other) for other in _OTHER_LENGTHS)


def can_block(config: CoordinatorConfig) -> bool:
    """Whether block decoding can give the configured law.

    It needs the law a draft was drawn from, which raw lists do not give at temperature != 1. With a seed the tokens
    must not depend on what the clock says is fastest.
    """
    return config.temperature == 1.0 and config.seed is None
