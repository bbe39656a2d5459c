"""The command line that makes vLLM draw rollouts from q*."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from dual_rollout.config import AlphaRule
from dual_rollout.native import ARCHITECTURE
from dual_rollout.native.refusals import names_of, refuse_flags
from dual_rollout.tokenizer_files import Vocabulary, compare_vocabularies


def vllm_command(
    theta: str, t: str | None, flags: Sequence[str], ordinary_requests: AlphaRule | None = None
) -> list[str]:
    """`python -m vllm.entrypoints.openai.api_server ...` with what draws rollouts, see `native.route`.

    Args:
        theta, t: folders or hub names; without `t` one model serves in both roles.
        flags: vLLM's own.
        ordinary_requests: how α is chosen for requests that are not ours, which are then drawn from q* too.

    Raises:
        ValueError: the models do not fit together, or are no plain decoder models; or `flags` that do not work.
        OSError: a model cannot be found.
    """
    refuse_flags(flags, two_models=t is not None)
    theta, t = _absolute(theta), None if t is None else _absolute(t)
    names = names_of(flags)
    # -P: a checkout in the current folder must not hide the installed package, by which vLLM finds the model class.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", theta]
    command += ["--logits-processors", "dual_rollout.native.processor:Processor"]
    command += ["--worker-extension-cls", "dual_rollout.native.processor.WorkerExtension"]
    command += ["--scheduler-cls", "dual_rollout.native.scheduler.pair_scheduler"]
    command += ["--middleware", "dual_rollout.native.route.RolloutMiddleware"]
    if t is not None:
        command += ["--hf-overrides", json.dumps(config_overrides(theta, t, ordinary_requests))]
    if ordinary_requests is not None and "--logprobs-mode" not in names:
        command += ["--logprobs-mode", "processed_logprobs"]  # or they would be π_θ's
    if "--enable-lora" in names and "--max-loras" not in names:
        command += ["--max-loras", "2"]  # one for each side
    return [*command, *flags]


def config_overrides(theta: str, t: str, ordinary_requests: AlphaRule | None = None) -> dict[str, Any]:
    """What π_θ's configuration is overridden with; `dual_rollout` is for the model class and the processor."""
    config_theta, config_t = _read_config(theta), _read_config(t)
    _check_same_tokens(theta, t, min(config_theta["vocab_size"], config_t["vocab_size"]))
    return {
        "architectures": [ARCHITECTURE],
        "dual_rollout": {
            "t": t,
            "architectures": config_theta["architectures"],
            "vocab_size_t": config_t["vocab_size"],
            "ordinary_requests": None if ordinary_requests is None else asdict(ordinary_requests),
        },
    }


def _absolute(model: str) -> str:
    """Clients find the tokenizer by the path that the server names."""
    folder = Path(model)
    return str(folder.resolve()) if folder.is_dir() else model


def _read_config(model: str) -> dict[str, Any]:
    config, _ = PretrainedConfig.get_config_dict(model)
    missing = [key for key in ("vocab_size", "architectures", "hidden_size") if not config.get(key)]
    if missing:
        raise ValueError(
            f"the configuration of {model!r} has no {', '.join(missing)} at its top level: the native engine takes "
            "plain text decoders. Serve this model on a server of its own, with engine: dual."
        )
    return config


def _check_same_tokens(theta: str, t: str, vocab_size: int) -> None:
    try:
        vocab_theta, vocab_t = (AutoTokenizer.from_pretrained(model).get_vocab() for model in (theta, t))
    except (OSError, ValueError) as error:
        print(f"dual-rollout: warning: tokenizers not compared: {error}", file=sys.stderr)
        return

    def known(vocab: dict[str, int]) -> dict[str, int]:
        return {token: token_id for token, token_id in vocab.items() if token_id < vocab_size}

    if beyond := {token for token, token_id in (vocab_theta | vocab_t).items() if token_id >= vocab_size}:
        print(
            f"dual-rollout: warning: {len(beyond)} tokens ({', '.join(sorted(beyond)[:3])}) are beyond the "
            f"{vocab_size} ids that both models know: they are never sampled, and our client refuses them in prompts",
            file=sys.stderr,
        )
    compared = compare_vocabularies(*(Vocabulary(known(vocab), {}, None) for vocab in (vocab_theta, vocab_t)))
    if compared.differences:
        raise ValueError(
            f"{theta} and {t} do not speak the same tokens: {'; '.join(compared.differences)}. "
            "q* needs two models with the same token ids"
        )
    for note in compared.notes:
        print(f"dual-rollout: warning: tokenizers: {note}", file=sys.stderr)
