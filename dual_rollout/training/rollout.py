"""`DualRollout`: q* as the rollout function of a TRL trainer, or of any other training loop."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any, TypeVar

from dual_rollout.config import AlphaRule, CoordinatorConfig
from dual_rollout.coordinator import check_entries
from dual_rollout.exceptions import RolloutError
from dual_rollout.text import with_template_options
from dual_rollout.training.connections import ServerConnections
from dual_rollout.training.contexts import TargetContexts, TargetContextsByPrompt
from dual_rollout.training.policy_check import PolicyCheck
from dual_rollout.training.processes import fail_together, process_index
from dual_rollout.training.random_streams import RandomStreams
from dual_rollout.training.rollout_batch import RolloutBatch
from dual_rollout.training.rollout_metrics import mode_of
from dual_rollout.training.schedules import AlphaSchedule
from dual_rollout.training.target_check import TargetCheck
from dual_rollout.training.trl_settings import check_rollout_is_all, check_training_args, uncorrected
from dual_rollout.training.turns import ROLLOUT_COLUMNS, RolloutInProgress
from dual_rollout.types import GenerationOutput, GenerationRequest, Prompt

logger = logging.getLogger(__name__)

T = TypeVar("T")


class DualRollout(ServerConnections):
    """Draws rollouts from q* between two servers.

    Give it to a trainer, `GRPOTrainer(rollout_func=DualRollout(config))`, or call `generate` in a loop of your own.
    Its connections, and how π_θ's server gets new weights, are those of
    `dual_rollout.training.connections.ServerConnections`. A forked process draws from the same random streams as its
    parent would: give each a seed of its own.

    With `config.seed` a trainer's random streams depend on the seed, the process, the training step, whether it trains
    or evaluates, and the number of the rollout (of each turn, with tools) within that step. They depend on nothing
    else: a resumed run goes on with the same ones, and evaluation does not change them.

    A trainer that evaluates (its model is not in training mode) gets completions of π_θ alone, α = 0 and weight 1, for
    it is the policy that is evaluated.

    Args:
        config: the servers and how q* is defined. Under a trainer, `temperature` and `max_completion_length` are the
            trainer's.
        tokenizer: the policy's; the trainer's, or the one `config` names, when None.
        eos_token_ids: the tokens that end a completion. When None, the trainer's, so that what it counts as finished is
            what was finished; without a trainer, those of the tokenizer's and the served model's files.
        schedule: how the bounds on α move over the trainer's steps. `generate`, which knows no steps, uses `config`.
        allow_uncorrected: whether a trainer may use the rollouts that neither sends its weights to π_θ's server nor
            applies importance weights, as a plain `GRPOTrainer` with `use_vllm=False`.
        policy_check_bound: nats per token that log π_θ may differ by between π_θ's server and the trainer, on fixed
            texts before and after each rollout; by the number formats of both when None (`policy_check.BOUNDS`).

    Raises:
        ValueError: a schedule that does not fit `config`, or a bound that is not above 0.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        tokenizer: Any = None,
        *,
        eos_token_ids: Collection[int] | None = None,
        schedule: AlphaSchedule | None = None,
        allow_uncorrected: bool = False,
        policy_check_bound: float | None = None,
    ):
        if policy_check_bound is not None and not policy_check_bound > 0:
            raise ValueError(f"policy_check_bound must be above 0, got {policy_check_bound!r}")
        super().__init__(config, tokenizer)
        self.policy_check_bound = policy_check_bound
        self.eos_token_ids = eos_token_ids
        self.allow_uncorrected = allow_uncorrected
        self.schedule = AlphaSchedule() if schedule is None else schedule
        self.schedule.at(config, 1.0)
        self._streams = RandomStreams()
        self._contexts = TargetContextsByPrompt()
        self._warned: set[str] = set()
        self._target_check = TargetCheck()

    def __call__(self, prompts: Sequence[Prompt], trainer: Any) -> dict[str, Any]:
        """TRL's rollout function: one sequence per prompt (they come already repeated per generation).

        What π_t sees (`t_prompt`) and which target it is (`t_target`) come from the rows that `DualGRPOTrainer` knows;
        under another trainer, which passes prompts alone, they are looked up by the prompt in `trainer.train_dataset`.

        Returns:
            `prompt_ids`, `completion_ids` and `logprobs` (log q*) as TRL requires, and per row the lists `alpha`,
            `importance_weights`, `logprobs_theta`, `logprobs_t`, `logprobs_q`, and `weight_version`, the step whose
            weights it was sampled under, which reach the reward functions by these names.

        Raises:
            RolloutError: a sequence failed.
            ValueError: the trainer asks for what q* cannot honour, or a prompt's contexts cannot be looked up, or the
                trainer corrects nothing and `allow_uncorrected` is not set.
        """
        in_progress = self.begin(trainer)
        with fail_together():
            check_rollout_is_all(trainer, prompts)
            contexts = TargetContexts()
            if not in_progress.of_policy:
                known = getattr(trainer, "rollout", None) is self
                contexts = trainer.contexts if known else self._contexts.find(prompts, trainer)
            outputs = in_progress.draw(prompts, contexts)
        in_progress.finish([[output] for output in outputs])
        return {
            "prompt_ids": [output.prompt_token_ids for output in outputs],
            "completion_ids": [output.generated_tokens for output in outputs],
            "logprobs": [output.record.logprobs_q for output in outputs],
            **{name: [getattr(output, name) for output in outputs] for name in ROLLOUT_COLUMNS},
        }

    def begin(self, trainer: Any) -> RolloutInProgress:
        """A rollout of a trainer; every process begins it.

        Raises:
            ValueError: the trainer asks for what q* cannot honour, or corrects nothing (`allow_uncorrected`).
            WeightSyncError: π_θ's server does not serve the trainer's policy.
        """
        check_training_args(trainer.args)
        if getattr(trainer, "rollout", None) is not self and (fault := uncorrected(trainer)) is not None:
            if not self.allow_uncorrected:
                raise ValueError(f"{fault}. To train like that on purpose, set allow_uncorrected=True in DualRollout")
            self._warn_once(fault)
        self._warn_of_settings(trainer)
        return RolloutInProgress(self, trainer)

    def draw_for(
        self,
        trainer: Any,
        prompts: Sequence[Prompt],
        contexts: TargetContexts,
        max_tokens: int | Sequence[int],
        config: CoordinatorConfig,
    ) -> list[GenerationOutput]:
        """Sequences under a trainer's settings; `RolloutInProgress.draw` is what calls it.

        Args:
            config: what chooses α at this step.

        Raises:
            RolloutError, ValueError: as there.
        """
        outputs = self._generate(
            prompts,
            alpha_rule=config.alpha_rule,
            t_prompts=contexts.t_prompts,
            targets=contexts.targets,
            max_tokens=max_tokens,
            temperature=trainer.temperature,
            eos_token_ids=trainer.eos_token_ids,
            stream=(mode_of(trainer), trainer.state.global_step, trainer.accelerator.process_index),
            tokenizer=self._tokenizer_under(trainer),
        )
        self._target_check.look_at(outputs, contexts.t_prompts, trainer.train_dataset)
        return outputs

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        num_generations: int = 1,
        t_prompts: Sequence[Prompt] | None = None,
        targets: Sequence[str | None] | None = None,
        max_tokens: int = 256,
        temperature: float | None = None,
    ) -> RolloutBatch:
        """`num_generations` sequences per prompt, those of one prompt next to each other.

        Successive calls draw from successive random streams of `config.seed`, in each process from its own. A loop may
        replace `config` between them: how α is chosen, `temperature` and `seed` are those of the moment, and what
        concerns the servers is that of the beginning.

        Args:
            prompts: strings, chat message lists or token-id lists, as π_θ sees them.
            t_prompts: what π_t sees instead, one per prompt.
            targets: which π_t, one per prompt: a name in `config.targets`, None for the one at `config.t_url`, "none"
                for no target (α = 0, weight 1).
            max_tokens: tokens per sequence at most.
            temperature: instead of the config's.

        Raises:
            RolloutError: a sequence failed.
            ValueError: wrong arguments.
        """
        check_entries(prompts, t_prompts=t_prompts, targets=targets)
        if not prompts:
            raise ValueError("prompts must be a list of at least one prompt, got none")
        if not isinstance(num_generations, int) or num_generations < 1:
            raise ValueError(f"num_generations must be a whole number >= 1, got {num_generations!r}")

        def repeat(rows: Sequence[T] | None) -> list[T] | None:
            return None if rows is None else [row for row in rows for _ in range(num_generations)]

        outputs = self._generate(
            [prompt for prompt in prompts for _ in range(num_generations)],
            t_prompts=repeat(t_prompts),
            targets=repeat(targets),
            max_tokens=max_tokens,
            temperature=self.config.temperature if temperature is None else temperature,
            alpha_rule=self.config.alpha_rule,
            stream=("loop", 0, process_index()),
            tokenizer=self.tokenizer,
        )
        self._target_check.look_at(outputs, t_prompts)
        tokenizer = self._open().tokenizer
        pad = 0 if tokenizer is None else tokenizer.pad_token_id
        return RolloutBatch.from_outputs(outputs, 0 if pad is None else pad)

    def encode(self, prompts: Sequence[Prompt], trainer: Any, tools: Sequence[Any] | None = None) -> list[list[int]]:
        """Token ids of a trainer's prompts, as its servers see them in `__call__`.

        Args:
            tools: for each prompt, the functions that its template shows; None for none.

        Raises:
            ValueError: a prompt that cannot be encoded; it names the first one.
        """
        coordinator, encoded = self._open(), []
        for i, prompt in enumerate(prompts):
            coordinator.tokenizer = self._tokenizer_under(trainer, None if tools is None else tools[i])
            try:
                encoded.append(coordinator.encode(prompt))
            except ValueError as error:
                raise ValueError(f"prompt {i} of the batch: {error}") from error
        return encoded

    def _generate(
        self,
        prompts: Sequence[Prompt],
        *,
        alpha_rule: AlphaRule,
        t_prompts: Sequence[Prompt | None] | None,
        targets: Sequence[str | None] | None,
        max_tokens: int | Sequence[int],
        temperature: float | None,
        stream: tuple[str, int, int],
        tokenizer: Any,
        eos_token_ids: Collection[int] | None = None,
    ) -> list[GenerationOutput]:
        coordinator = self._open()
        if tokenizer is not None:
            coordinator.tokenizer = tokenizer
        n = len(prompts)
        each = [max_tokens] * n if isinstance(max_tokens, int) else max_tokens
        rows = zip(range(n), prompts, t_prompts or [None] * n, targets or [None] * n, each, strict=True)
        outputs = self._run(
            coordinator.generate_requests(
                [GenerationRequest(*row) for row in rows],
                max_tokens=max(each),
                temperature=temperature,
                seed=self._seed(*stream),
                alpha_rule=alpha_rule,
                eos_token_ids=eos_token_ids if self.eos_token_ids is None else self.eos_token_ids,
                return_diagnostics=True,
            )
        )
        failed = [(i, output.error) for i, output in enumerate(outputs) if output.error is not None]
        if failed:
            i, error = failed[0]
            raise RolloutError(f"{len(failed)} of {len(outputs)} sequences failed; the first is number {i}: {error}")
        return outputs

    def policy_check(self, trainer: Any) -> PolicyCheck:
        """Compare what π_θ's servers serve with the trainer's policy; to be run again after the rollout."""
        check = PolicyCheck(
            trainer,
            self._tokenizer_under(trainer),
            owner=None if trainer.use_vllm else self._given_version,
            bound=self.policy_check_bound,
        )
        check.run(self.ask_policy_servers, "before the rollout")
        return check

    def _warn_of_settings(self, trainer: Any) -> None:
        lists = self.list_settings
        named = lists.get("support") == "tail" or lists.get("missing") == "exact"
        if named and trainer.accelerator.num_processes > 1:
            self._warn_once(
                'support "tail" and missing "exact" ask for tokens by name, and some vLLM versions then garble the '
                "lists of other requests in the same step, here those of other trainer processes. Lists that cannot be "
                'right are asked for again; to be safe, use support "union" with missing "floor", or one process'
            )

    def _tokenizer_under(self, trainer: Any, tools: Any = None) -> Any:
        """The policy's tokenizer, with the trainer's arguments for its chat template, and its own template if any."""
        own = self.tokenizer
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class) if own is None else own
        options = {"tools": tools or None, "chat_template": getattr(trainer, "chat_template", None)}
        given = {name: value for name, value in options.items() if value is not None}
        return with_template_options(tokenizer, {**given, **trainer.chat_template_kwargs})

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            logger.warning(message)

    def _seed(self, mode: str, step: int, process: int) -> int | None:
        return self._streams.next_seed(self.config.seed, mode, step, process)
