"""`DualRolloutWorker`: rollouts from q* for TRL's asynchronous trainer.

TRL's worker renders prompts, runs tools, scores groups and fills the queue; each turn it asks `_generate_one_turn` for
tokens and their log-probabilities, and that alone is replaced here. The log-probabilities are log q*, so that the
trainer's ratio exp(log π_θ − log q*) is the importance weight itself, of the weights that are trained at that moment.

The worker's dataset may have the columns `t_prompt` and `t_target`. TRL hands over each row's prompt, with what its
environment showed first, and then the text of each turn; π_t sees the row's `t_prompt` with the same turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
from trl.experimental.async_grpo.async_rollout_worker import AsyncRolloutWorker, _AsyncRolloutLoop

from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.exceptions import RolloutError
from dual_rollout.text import encode_prompt, with_template_options
from dual_rollout.training.contexts import T_TARGET_COLUMN, TargetContexts, same_turns
from dual_rollout.training.random_streams import RandomStreams
from dual_rollout.training.target_check import TargetCheck
from dual_rollout.training.trl_settings import check_sampling_is_plain


@dataclass
class _Conversation:
    """What π_t sees of a conversation, which is a task of its own in TRL's loop.

    Attributes:
        t_prompt: token ids; None where π_t sees what π_θ sees.
        target: the name of π_t.
        prompt: what π_θ saw in the first turn; None before it.
    """

    t_prompt: list[int] | None
    target: str | None
    prompt: list[int] | None = None

    def seen_by_target(self, context: list[int]) -> list[int] | None:
        """What π_t sees where π_θ sees `context`."""
        if self.prompt is None:
            self.prompt = context
        return None if self.t_prompt is None else same_turns(self.prompt, self.t_prompt, context)


_conversation: ContextVar[_Conversation] = ContextVar("conversation")


class DualRolloutLoop(_AsyncRolloutLoop):
    """TRL's loop, in its process, whose turns come from q*."""

    def __init__(self, *, dual_config: CoordinatorConfig, **options: Any):
        super().__init__(**options)
        self._coordinator = DualVLLMCoordinator(dual_config, tokenizer=self.tokenizer)
        self._streams, self._target_check = RandomStreams(), TargetCheck()
        self._row: Mapping[str, Any] = {}

    async def _run_loops(self, stop_event: asyncio.Event) -> None:
        async with self._coordinator:
            await super()._run_loops(stop_event)

    def _repeat_iterator(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for group_id, row in super()._repeat_iterator():
            self._row = row  # the next conversation's
            yield group_id, row

    def _generate_one(self, prompt: Any, tool_dict: Any, tools: Any, group_id: int = 0) -> Coroutine[Any, Any, Any]:
        conversation = _Conversation(self._t_prompt(prompt, tools), self._row.get(T_TARGET_COLUMN))

        async def generate() -> Any:
            _conversation.set(conversation)  # for the turns of this task alone
            return await super(DualRolloutLoop, self)._generate_one(prompt, tool_dict, tools, group_id)

        return generate()

    def _t_prompt(self, prompt: Any, tools: Any) -> list[int] | None:
        """Token ids of the row's `t_prompt`, rendered as TRL renders `prompt`."""
        contexts = TargetContexts.from_rows([self._row]).with_observations([self._row.get("prompt")], [prompt])
        if contexts.t_prompts is None:
            return None
        options = {"tools": tools or None, "chat_template": self.chat_template, **self.chat_template_kwargs}
        given = {name: value for name, value in options.items() if value is not None}
        parse = self._coordinator.config.parse_special_tokens
        tokenizer = with_template_options(self.tokenizer, given)
        return encode_prompt(contexts.t_prompts[0], tokenizer, parse_special_tokens=parse)

    async def _generate_one_turn(self, prompt_ids: list[int]) -> tuple[list[int], list[float]]:
        conversation = _conversation.get()
        (output,) = await self._coordinator.generate_batch(
            [prompt_ids],
            t_prompts=[conversation.seen_by_target(prompt_ids)],
            targets=[conversation.target],
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self._streams.next_seed(self._coordinator.config.seed, "loop", step=0, process=0),  # of each turn
            eos_token_ids=self.eos_token_ids,
            return_diagnostics=True,
        )
        if output.error is not None:
            raise RolloutError(output.error)
        self._target_check.look_at(
            [output], None if conversation.t_prompt is None else [conversation.t_prompt], self.dataset
        )
        self._count("sampling/alpha/mean", output.alpha_history)
        self._count("sampling/importance_sampling_ratio/mean", output.importance_weights)
        return output.generated_tokens, output.logprobs_q

    def _count(self, name: str, values: Sequence[float]) -> None:
        """For the mean that the trainer logs: TRL sends sums and counts with its own metrics."""
        self._rates[name][0] += float(np.sum(values))
        self._rates[name][1] += len(values)


class DualRolloutWorker(AsyncRolloutWorker):
    """TRL's worker with turns from q*: what `DualAsyncGRPOTrainer` makes of its settings.

    In a plain `AsyncGRPOTrainer(rollout_worker=...)` nothing compares what π_θ's server serves with the trainer's
    policy, and a transfer of TRL's may send nothing without an error.

    Args:
        dual_config: the servers and how q* is defined; TRL must send the weights to `theta_url`.
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
