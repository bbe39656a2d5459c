"""Find out by measuring how to decode fastest on these servers: the mode, with `decoding: auto`, and the grouping."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from dual_rollout.config import CoordinatorConfig
from dual_rollout.engine import ScoringMethod

logger = logging.getLogger(__name__)

DEFAULT_DRAFT_TOKENS = 8
_FIRST_LENGTH, _OTHER_LENGTHS = 4, (8, 2)
_LOCKSTEP_ROUNDS, _BLOCK_ROUNDS = 6, 3  # of one measurement
_SURE_S, _SURE_TRIALS = 1.0, 10  # when the two best are measured well: where rounds are short, a few say little
_SETTLED_ROUNDS = 8, 32  # at first, and when the choice has stood for a while
_SIMPLER = 0.95  # an earlier choice this close to the fastest is preferred: measurements err by as much
_HOPELESS = 0.4  # of the best so far: another way to score will not make up for this
_PROMISING = 0.85  # of the best so far: worth trying at other lengths
_MANY_SEQUENCES = 16  # from here on, four groups may be faster yet than two
_REMEMBERED_ROUNDS = 512  # after as many, what was slower is measured again: acceptance changes as the policy learns


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

    def __str__(self) -> str:
        return f"{self.sequences} sequences, {self.context} tokens"

    def distance(self, other: Load) -> int:
        return abs(self.sequences.bit_length() - other.sequences.bit_length()) + abs(
            self.context.bit_length() - other.context.bit_length()
        )


@dataclass(slots=True)
class Measured:
    """Tokens and seconds of each choice at one load, the recent ones most.

    Attributes:
        trials: how often each was measured.
        explored: whether all that was worth trying has been.
        rounds: since then.
        alone: whether to try everything, whatever is known of other loads.
    """

    totals: dict[Choice, tuple[float, float]] = field(default_factory=dict)
    trials: Counter[Choice] = field(default_factory=Counter)
    explored: bool = False
    rounds: int = 0
    alone: bool = False

    @property
    def rates(self) -> dict[Choice, float]:
        """Tokens per second, in the order of the first trials."""
        return {choice: tokens / seconds for choice, (tokens, seconds) in self.totals.items()}

    def unsure(self, choice: Choice) -> bool:
        """Whether to measure it again before it is settled on."""
        trials = self.trials[choice]
        return trials < 2 or (self.totals[choice][1] < _SURE_S and trials < _SURE_TRIALS)

    def note(self, choice: Choice, tokens: int, seconds: float) -> None:
        # What was done once, such as making room, was paid for by the first trial: the second stands in its place.
        weight = 0.5 if self.explored else float(self.trials[choice] > 1)
        before = self.totals.get(choice, (0.0, 0.0))
        self.totals[choice] = weight * before[0] + tokens, weight * before[1] + seconds
        self.trials[choice] += 1

    def best(self, count: int) -> list[Choice]:
        """The fastest, the fastest first."""
        rates = self.rates
        return sorted(rates, key=rates.__getitem__, reverse=True)[:count]

    def forget_all_but(self, choice: Choice) -> None:
        """Begin to explore again."""
        self.totals = {choice: self.totals[choice]}
        self.trials = Counter({choice: self.trials[choice]})
        self.explored, self.rounds, self.alone = False, 0, True


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do next, and for how many rounds."""

    choice: Choice
    rounds: int
    measured: Measured

    def note(self, tokens: int, seconds: float) -> None:
        """What came of it."""
        self.measured.note(self.choice, tokens, seconds)


class Tuner:
    """Tokens per second of each choice, measured while decoding, by load. Lives as long as its coordinator.

    At first every choice is tried for a few rounds; near a load that has been explored, only its two best are compared.
    Then the best is used, and measured on; once in a while the others are tried again. Measuring costs nothing but the
    difference in speed: what is sampled meanwhile is as exact as ever.

    Attributes:
        scoring: the ways in which π_t's server can score drafts.
        processed: whether π_θ's server reports log-probabilities that follow the temperature.
        sessions: whether both servers keep texts, so that a round costs little more than a step.
        chosen: what was found fastest at the latest load.
    """

    def __init__(
        self, scoring: tuple[ScoringMethod, ...] = ("prefixes",), *, processed: bool = False, sessions: bool = False
    ) -> None:
        self.scoring = scoring
        self.processed = processed
        self.sessions = sessions
        self.chosen: Choice | None = None
        self._measured: dict[tuple[bool, Load], Measured] = {}
        self._rounds = _SETTLED_ROUNDS[0]

    def first(self, config: CoordinatorConfig) -> Choice:
        """For the round that reads the prompts."""
        if config.decoding == "block":
            return Choice("block", 1, config.num_draft_tokens or DEFAULT_DRAFT_TOKENS, self.scoring[0])
        return Choice("lockstep", 1)

    def choose(self, config: CoordinatorConfig, load: Load) -> Plan:
        """What to do next; its outcome is to be noted in the plan."""
        drafting = self.may_draft(config)
        measured = self._measured.setdefault((drafting, load), Measured())
        if not measured.explored:
            untried = (choice for choice in self._worth_trying(config, load, measured) if not measured.trials[choice])
            unsure = (choice for choice in measured.best(2) if measured.unsure(choice))
            for choice in itertools.chain(untried, unsure):
                return Plan(choice, _LOCKSTEP_ROUNDS if choice.mode == "lockstep" else _BLOCK_ROUNDS, measured)
            measured.explored = True
        rates = measured.rates
        best = max(rates.values())
        chosen = next(choice for choice, rate in rates.items() if rate >= _SIMPLER * best)
        if measured.rounds >= _REMEMBERED_ROUNDS:
            measured.forget_all_but(chosen)
            return self.choose(config, load)
        self._rounds = min(2 * self._rounds, _SETTLED_ROUNDS[1]) if chosen == self.chosen else _SETTLED_ROUNDS[0]
        measured.rounds += self._rounds
        if chosen != self.chosen:
            logger.info("decoding by %s; measured at %s: %s tokens/s", chosen, load, _rounded(rates))
        self.chosen = chosen
        return Plan(chosen, self._rounds, measured)

    def may_draft(self, config: CoordinatorConfig) -> bool:
        """Whether block decoding is wanted and gives q* as configured.

        It needs the distribution that a draft was drawn from, which raw lists do not give at temperature != 1. With a
        seed the tokens must not depend on what the clock says is fastest, so that "auto" keeps to lockstep. And with
        sessions on both servers lockstep was faster at every load that was measured (docs/performance.md): trials of
        block decoding, whose requests send whole texts, would only cost time.
        """
        if config.decoding == "auto":
            unseeded, known = config.seed is None, config.temperature == 1.0 or self.processed
            return unseeded and known and not self.sessions
        return config.decoding == "block"

    def report(self) -> dict[str, dict[str, float]]:
        """Measured tokens per second, by load and choice; the reason for what was chosen."""
        return {
            f"{load}{'' if drafting else ', lockstep only'}": _rounded(measured.rates)
            for (drafting, load), measured in self._measured.items()
        }

    def _worth_trying(self, config: CoordinatorConfig, load: Load, measured: Measured) -> Iterator[Choice]:
        """The choices to measure, in order. What comes later depends on what was measured of the earlier ones."""
        drafting = self.may_draft(config)
        explored = {other: m for (kind, other), m in self._measured.items() if kind == drafting and m.explored}
        if explored and not measured.alone:
            yield from explored[min(explored, key=load.distance)].best(2)
            return
        groups = (1, 2) if load.sequences > 1 else (1,)
        if config.decoding != "block":
            yield from (Choice("lockstep", count) for count in groups)
            if self.sessions and load.sequences >= _MANY_SEQUENCES and measured.best(1) == [Choice("lockstep", 2)]:
                yield Choice("lockstep", 4)  # a round is short there, and much of it is not the servers'
            if not drafting:
                return
        length = config.num_draft_tokens or (DEFAULT_DRAFT_TOKENS if config.decoding == "block" else _FIRST_LENGTH)
        # Kernels round differently by method: with a seed the clock must not decide.
        methods = self.scoring if config.seed is None else self.scoring[:1]
        blocks = [Choice("block", groups[-1], length, method) for method in methods]
        for choice in blocks:
            yield choice
            if config.decoding == "auto" and measured.rates[choice] < _HOPELESS * max(measured.rates.values()):
                return
        fastest = max(blocks, key=measured.rates.__getitem__)
        if config.decoding == "auto" and measured.rates[fastest] < _PROMISING * max(measured.rates.values()):
            return
        yield replace(fastest, groups=1)
        if config.decoding == "auto" and config.num_draft_tokens is None:
            yield from (replace(fastest, num_draft_tokens=other) for other in _OTHER_LENGTHS)


def _rounded(rates: Mapping[Choice, float]) -> dict[str, float]:
    return {str(choice): round(rate, 1) for choice, rate in rates.items()}
