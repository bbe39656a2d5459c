"""`DualAsyncGRPOTrainer`: TRL's asynchronous GRPO on rollouts from q*, with a check of every weight transfer."""

from __future__ import annotations

from typing import Any

from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from dual_rollout.config import CoordinatorConfig, url_list
from dual_rollout.training.async_grpo import DualRolloutWorker
from dual_rollout.training.async_policy_check import AsyncPolicyCheck
from dual_rollout.training.trl_settings import check_sampling_is_plain


class DualAsyncGRPOTrainer(AsyncGRPOTrainer):
    """TRL's `AsyncGRPOTrainer` with a `DualRolloutWorker`, made of its own settings, and an `AsyncPolicyCheck`.

    The worker gives log q* as the log-probabilities of its tokens. So the ratio in TRL's loss is the importance weight
    π_θ/q*, of the weights that are trained at that moment.

    The columns `t_prompt` and `t_target` of `train_dataset` say what π_t sees, and which π_t.

    Args:
        model: as for TRL's.
        args: `vllm_server_base_url` is π_θ's server. Set `epsilon=1.0` and `epsilon_high=2.0`: TRL's default clips the
            ratio at 0.8 and 1.2, and q* is further from the policy by design. These bound the weights at 3 where the
            advantage is positive, and nothing else.
        dual_config: the servers and how q* is defined.
        policy_check_bound: as for `AsyncPolicyCheck`.
        options: as for TRL's. With a `rollout_worker` none is made.

    Raises:
        ValueError: sampling options that q* cannot honour, a clip that nobody chose, two addresses for π_θ, or a
            server that would be sent an adapter.
        ImportError: vLLM, which TRL's transfer needs, is not installed beside the trainer.
    """

    def __init__(
        self,
        model: str,
        *,
        args: AsyncGRPOConfig,
        dual_config: CoordinatorConfig,
        policy_check_bound: float | None = None,
        **options: Any,
    ):
        _check_args(args, dual_config)
        super().__init__(model, args=args, **options)
        check = AsyncPolicyCheck(self, dual_config, bound=policy_check_bound)
        if self.accelerator.is_main_process and options.get("rollout_worker") is None:
            trls: Any = self.rollout_worker
            worker: Any = DualRolloutWorker(dual_config=dual_config, **trls._loop_kwargs)
            self.rollout_worker, self.rollout_queue = worker, worker.rollout_buffer
        self.add_callback(check)


def _check_args(args: AsyncGRPOConfig, config: CoordinatorConfig) -> None:
    check_sampling_is_plain(vars(args))
    if url_list(config.theta_url) != [args.vllm_server_base_url.rstrip("/")]:
        raise ValueError(
            f"TRL sends the weights to vllm_server_base_url={args.vllm_server_base_url!r}, and π_θ is asked at "
            f"theta_url={config.theta_url!r}: give one server, by the same URL in both"
        )
    if (args.epsilon, args.epsilon_high) == (AsyncGRPOConfig.epsilon, None):
        raise ValueError(
            f"epsilon={args.epsilon}, TRL's default, would clip most weights π_θ/q*: set epsilon=1.0 and "
            "epsilon_high=2.0, or another clip with epsilon_high"
        )
