"""`DualRolloutWorker`: rollouts from q* for TRL's `AsyncGRPOTrainer`.

TRL's worker renders prompts, runs tools, scores groups and fills the queue; each turn it asks `_generate_one_turn` for
tokens and their log-probabilities, and that alone is replaced here. The log-probabilities are log q*, so that the
trainer's ratio exp(log π_θ − log q*) is the importance weight itself, of the weights that are trained at that moment.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, _AsyncRolloutLoop

from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.exceptions import RolloutError
from dual_rollout.training.trl_settings import check_sampling_is_plain


class DualRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop, in its process, whose turns come from q*."""

    def __init__(self, *, dual_config: CoordinatorConfig, **options: Any):
        super().__init__(**options)
        self._coordinator = DualVLLMCoordinator(dual_config, tokenizer=self.tokenizer)
        self._turns = 0

    async def _run_loops(self, stop_event: asyncio.Event) -> None:
        async with self._coordinator:
            await super()._run_loops(stop_event)

    async def _generate_one_turn(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        (output,) = await self._coordinator.generate_batch(
            [prompt_ids],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self._next_seed(),
            eos_token_ids=self.eos_token_ids,
        )
        if output.error is not None:
            raise RolloutError(output.error)
        return output.generated_tokens, output.logprobs_q

    def _next_seed(self) -> int | None:
        """A stream of its own for each turn: those of one group have one prompt."""
        seed, self._turns = self._coordinator.config.seed, self._turns + 1
        if seed is None:
            return None
        return int(np.random.SeedSequence([seed, self._turns]).generate_state(1, np.uint64)[0])


class DualRolloutWorker(AsyncRolloutWorker):
    """For `AsyncGRPOTrainer(rollout_worker=...)`: TRL's worker with turns from q*.

    The trainer's `vllm_server_base_url` must be π_θ's server, `dual_config.theta_url`, to which TRL sends the weights.
    Set the trainer's `epsilon=1.0` and `epsilon_high=2.0`: around 1 its clip would cut off most weights, since q* is
    far from the policy by design; this way it bounds them at 3 where the advantage is positive, and nothing else.

    Args:
        dual_config: the servers and how q* is defined.
        options: as for `AsyncRolloutWorker`, which needs vLLM to be installed beside the trainer.

    Raises:
        ValueError: an adapter's name, or sampling options that q* cannot honour.
    """

    _loop_cls = DualRolloutLoop

    def __init__(self, *, dual_config: CoordinatorConfig, **options: Any):
        check_sampling_is_plain(options)
        if options.get("lora_name") is not None:
            raise ValueError("lora_name: q* is asked from the served model; let TRL send merged weights")
        super().__init__(dual_config=dual_config, **options)
