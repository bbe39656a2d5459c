"""What decoding counts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dual_rollout.functional.candidates import Candidates


@dataclass(slots=True)
class DecodingStats:
    """Counts over a coordinator's life.

    Attributes:
        positions: distributions built; in block decoding more than tokens, since a rejection wastes what follows it.
        listed_tokens, listed_mass: tokens of the lists that those were built from, and their mass; two a position.
        received_tokens: tokens of all lists that came, with those that `top_k: auto` cut off or asked for again.
        repeated_lists: lists that `top_k: auto` asked for again, because the first did not hold enough mass.
        tokens: tokens sampled.
        draft_tokens, accepted_tokens: tokens drafted from π_θ, and those of them that q* accepted.
        tail_tokens: tokens outside both lists.
        tail_draws: draws from π_θ spent on tail tokens.
        scored_tokens: log-probabilities fetched afterwards because a list lacked the sampled token.
        approximate_tail_weights: tail tokens whose weight uses floored candidates, because the server does not report
            named tokens.
        policy_tokens: tokens drawn from π_θ alone, because their prompt has no target or π_t's server was gone.
        lost_target_tokens: those of them for which π_t's server was gone.
        restarts: times that the two sides of a pair fell out of step on their server, and were begun again there.
        cache_waits: times that a pair waited for others to end, because its server's KV cache holds fewer of them than
            there are places.
        disjoint_positions: positions where complete lists shared no token; sampled from the policy there.
    """

    positions: int = 0
    listed_tokens: int = 0
    listed_mass: float = 0.0
    received_tokens: int = 0
    repeated_lists: int = 0
    tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    tail_tokens: int = 0
    tail_draws: int = 0
    scored_tokens: int = 0
    approximate_tail_weights: int = 0
    policy_tokens: int = 0
    lost_target_tokens: int = 0
    disjoint_positions: int = 0
    restarts: int = 0
    cache_waits: int = 0

    @property
    def top_k_mean(self) -> float:
        """Mean length of the lists that distributions were built from; 0 before the first."""
        return self.listed_tokens / (2 * self.positions) if self.positions else 0.0

    @property
    def top_k_mass_mean(self) -> float:
        """Mean mass of these lists; 0 before the first."""
        return self.listed_mass / (2 * self.positions) if self.positions else 0.0

    @property
    def acceptance_rate(self) -> float:
        """Accepted over drafted tokens; 0 without drafts."""
        return self.accepted_tokens / self.draft_tokens if self.draft_tokens else 0.0

    def count_lists(self, candidates: Candidates) -> None:
        """Count the lists that R distributions are built from."""
        listed = (candidates.exact_theta, candidates.exact_t)
        self.positions += len(candidates.token_ids)
        self.listed_tokens += sum(int(np.isfinite(logprobs).sum()) for logprobs in listed)
        self.listed_mass += float(candidates.coverage_theta.sum() + candidates.coverage_t.sum())
