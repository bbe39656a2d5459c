"""Settings of a TRL trainer that would make log q* something other than the distribution of its samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dual_rollout.prompts import check_prompt_is_text
from dual_rollout.types import Prompt


def check_training_args(args: Any) -> None:
    """Refuse settings of a TRL config that would make log q* something other than the distribution of its samples.

    Raises:
        ValueError: names the key and what to set it to.
    """
    check_sampling_is_plain({name: getattr(args, name) for name in _NEUTRAL})
    if args.bf16 and args.use_cpu:
        raise ValueError(
            "bf16, TRL's default, makes a CPU compute log π_θ in bfloat16, up to 0.1 nats per token from what a "
            "float32 server samples from: set bf16=False"
        )
    if args.generation_kwargs:
        raise ValueError("generation_kwargs do nothing to rollouts from q*: unset it")
    if not args.use_vllm:
        return
    if args.vllm_mode != "server":
        raise ValueError(f'rollouts from q* need vllm_mode: "server" (or use_vllm: false), got {args.vllm_mode!r}')
    if args.vllm_importance_sampling_correction and args.vllm_importance_sampling_mode.startswith("sequence"):
        raise ValueError(
            f"vllm_importance_sampling_mode={args.vllm_importance_sampling_mode!r} multiplies the weights of a whole "
            'sequence, which vanish exponentially for samples from q*: set it to "token_truncate"'
        )


def check_sampling_is_plain(options: Mapping[str, Any]) -> None:
    """Refuse sampling options, by TRL's names, under which log q* would not be the distribution of its samples.

    Raises:
        ValueError: names the key and what to set it to.
    """
    for name, neutral in _NEUTRAL.items():
        value = options.get(name, neutral[0])
        if value not in neutral:
            raise ValueError(f"{name}={value} with q* would make its weights wrong: set it to {neutral[0]}")


def check_rollout_is_all(trainer: Any, prompts: Sequence[Prompt]) -> None:
    """Refuse what makes a trainer generate beside the rollout, or shows the policy more than the servers see.

    Raises:
        ValueError: tools, or images in a prompt.
    """
    if getattr(trainer, "tools", None):
        raise ValueError(
            "with tools (or an environment_factory with methods) this trainer would generate what follows a tool call "
            "from the policy itself, outside q*: use DualGRPOTrainer, which draws every turn from q*"
        )
    for prompt in prompts:
        check_prompt_is_text(prompt)


def uncorrected(trainer: Any) -> str | None:
    """Why a trainer would take samples from q* for its policy's; None if it corrects them."""
    if not trainer.use_vllm:
        return (
            "this trainer applies no importance weights to rollouts from q*, and sends no new weights to the policy's "
            "server: use DualGRPOTrainer, or use_vllm=True"
        )
    if not trainer.args.vllm_importance_sampling_correction:
        return (
            "vllm_importance_sampling_correction=False leaves rollouts from q* without their importance weights: set "
            "it to True, or use DualGRPOTrainer"
        )
    return None


_NEUTRAL = {"top_p": (1.0,), "top_k": (0, -1, None), "min_p": (None, 0.0), "repetition_penalty": (1.0,)}
