"""Going on when π_t's server is gone, as `on_target_failure` says."""

from __future__ import annotations

import logging
import time

from dual_rollout.decoding.call import DecodingCall
from dual_rollout.decoding.outage import Outage, until_back
from dual_rollout.decoding.policy_alone import PolicyAlone
from dual_rollout.decoding.scheduler import Mode
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.exceptions import EngineProtocolError, EngineUnavailableError

logger = logging.getLogger(__name__)

_TOKENS_WHILE_GONE = 8  # few, so that π_t is soon asked again


class TargetFailover:
    """A mode that goes on as `on_target_failure` says when π_t's server is gone."""

    def __init__(self, mode: Mode, call: DecodingCall, outage: Outage):
        self._mode = mode
        self._call = call
        self._outage = outage
        self._policy = PolicyAlone(call, _TOKENS_WHILE_GONE, lost=True)

    async def advance(self, sequences: list[DecodingSequence]) -> None:
        """A round of the mode, or tokens of π_θ alone."""
        on_failure = self._call.config.on_target_failure
        if on_failure == "wait":
            await until_back(lambda: self._mode.advance(sequences), self._call.t.engine.url)
        elif on_failure == "policy":
            await self._advance_somehow(sequences)
        else:
            await self._mode.advance(sequences)

    async def _advance_somehow(self, sequences: list[DecodingSequence]) -> None:
        left = [sequence for sequence in sequences if sequence.unknown_to_t]
        if left:
            await self._policy.advance(left)
            sequences = [sequence for sequence in sequences if not sequence.unknown_to_t]
        if sequences:
            await self._advance_with_target(sequences)

    async def _advance_with_target(self, sequences: list[DecodingSequence]) -> None:
        if not self._outage.lasts:
            started = time.monotonic()
            try:
                await self._mode.advance(sequences)
                return
            except (EngineUnavailableError, EngineProtocolError) as error:
                if error.url != self._call.t.engine.url:
                    raise
                if isinstance(error, EngineUnavailableError):
                    self._outage.begin(time.monotonic() - started)
                elif len(sequences) > 1:
                    raise  # one prompt may be to blame; the scheduler finds it
                logger.warning("going on without the target (on_target_failure is policy): %s", error)
        await self._policy.advance(sequences)
        t = self._call.t.engine
        vocab_size = (await t.probe(sequences[0].context_t)).vocab_size  # found before the first token
        for sequence in sequences:
            recent = sequence.tokens[-_TOKENS_WHILE_GONE:]
            sequence.unknown_to_t = vocab_size is not None and any(token >= vocab_size for token in recent)
