"""Whether π_θ's server serves the policy after each weight transfer of TRL's `AsyncGRPOTrainer`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from transformers import TrainerCallback

from dual_rollout.config import CoordinatorConfig
from dual_rollout.training.connections import ServerConnections
from dual_rollout.training.policy_check import PolicyCheck
from dual_rollout.training.processes import fail_together
from dual_rollout.training.weight_sync import check_nccl_is_on

_LIKELY_REASONS = (
    "TRL's transfer did not arrive, or not whole; another program gives the server weights (give each trainer its own "
    "server); it is quantised or computes otherwise, which makes every weight π_θ/q* wrong by that much (if that is "
    "wanted, set policy_check_bound)"
)


class AsyncPolicyCheck(TrainerCallback):
    """Stops an `AsyncGRPOTrainer` whose π_θ server does not serve the policy after a weight transfer.

    `DualAsyncGRPOTrainer` has it. Any other gets it by `trainer.add_callback(AsyncPolicyCheck(trainer, config))`.

    After the transfer at the beginning and after each later one it compares log π_θ of two fixed texts, the server's
    and the trainer's own, as the trainers of this project do before every rollout. Logged as `sampling/policy_check`
    (nats per token) and `perf/policy_check_s`.

    Args:
        trainer: an `AsyncGRPOTrainer`. TRL's own callbacks, which send the weights, must stand before this one, so it
            goes to `add_callback`, not into `callbacks=[...]`.
        config: the worker's `dual_config`.
        bound: nats per token that rounding explains; by the number formats of both when None (`policy_check.BOUNDS`).

    Raises:
        ValueError: TRL would send an adapter, which q* is not asked from; or a bound that is not above 0.
        WeightSyncError: in training, before the first step or after the step whose weights did not arrive.
    """

    def __init__(self, trainer: Any, config: CoordinatorConfig, *, bound: float | None = None):
        if getattr(trainer, "_lora_sync", False):
            raise ValueError(
                "π_θ's server was started with --enable-lora, so TRL sends it the adapter alone, under names that q* is"
                " not asked from. Start it without --enable-lora; TRL then sends merged weights"
            )
        if bound is not None and not bound > 0:
            raise ValueError(f"bound must be above 0, got {bound!r}")
        self._trainer, self._bound, self._began = trainer, bound, False
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._servers = ServerConnections(config, self._tokenizer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare after TRL's first transfer."""
        if not self._began:  # as TRL, which sends weights at the first beginning alone
            self._began = True
            self._compare("after TRL's first transfer")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Compare if TRL has sent weights in this step."""
        if state.global_step % args.weight_sync_steps == 0:
            self._compare(f"after TRL's transfer in step {state.global_step}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Close the connections."""
        self._servers.close()

    def _compare(self, when: str) -> None:
        trainer = self._trainer
        with fail_together():
            check_nccl_is_on(getattr(trainer.weight_transfer, "model_update_group", None))
        with _plain_attention(trainer.model):
            check = PolicyCheck(trainer, self._tokenizer, owner=None, bound=self._bound, reasons=_LIKELY_REASONS)
        check.run(self._servers.ask_policy_servers, when)
        check.log(trainer._metrics["train"])


@contextlib.contextmanager
def _plain_attention(model: Any) -> Iterator[None]:
    """TRL's packed attention takes only batches in its own form."""
    packed = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(packed)
