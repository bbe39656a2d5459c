"""The command line that makes vLLM serve q* of two models."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig

from dual_rollout.functional.pseudo_tokens import NUM_PSEUDO_TOKENS
from dual_rollout.native import ARCHITECTURE
from dual_rollout.native.refusals import names_of, refuse_flags
from dual_rollout.tokenizer_files import Vocabulary, compare_vocabularies


@dataclass(frozen=True, kw_only=True)
class NativeSettings:
    """What the native engine is told of the law.

    Attributes:
        theta, t: folders or hub names of π_θ and π_t.
        alpha_method: "kl_symmetry" or "fixed" (with `fixed_alpha`).
        alpha_min, alpha_max: bounds on α.
        temperature: that of the pair α is solved for; clients then ask for this temperature.

    Raises:
        ValueError: a value out of range.
    """

    theta: str
    t: str
    alpha_method: str = "kl_symmetry"
    fixed_alpha: float | None = None
    alpha_min: float = 0.0
    alpha_max: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("theta", "t"):  # clients find the tokenizer by the path that the server names
            if (folder := Path(getattr(self, name))).is_dir():
                object.__setattr__(self, name, str(folder.resolve()))
        if not 0 <= self.alpha_min <= self.alpha_max <= 1:
            raise ValueError(f"need 0 <= --alpha-min <= --alpha-max <= 1, got {self.alpha_min} and {self.alpha_max}")
        if (self.alpha_method == "fixed") != (self.fixed_alpha is not None):
            raise ValueError("--fixed-alpha belongs to --alpha-method fixed: give both or neither")
        if self.fixed_alpha is not None and not 0 <= self.fixed_alpha <= 1:
            raise ValueError(f"--fixed-alpha must be in [0, 1], got {self.fixed_alpha}")
        if not 0.05 <= self.temperature <= 2:
            raise ValueError(f"--temperature must be in [0.05, 2], got {self.temperature}")


def vllm_command(settings: NativeSettings, flags: Sequence[str]) -> list[str]:
    """`python -m vllm.entrypoints.openai.api_server ...`: π_θ's folder, with its configuration overridden.

    Log-probabilities follow the temperature unless `flags` says otherwise, so that those served are always of the law
    that was sampled from.

    Raises:
        ValueError: the two models do not fit together, or are no plain decoder models; or `flags` name a model.
        OSError: a model cannot be found.
    """
    names = names_of(flags)
    if taken := names & {"--model", "--hf-overrides"}:
        raise ValueError(
            f"{' and '.join(sorted(taken))} would replace π_θ or q* itself: write it into THETA's config.json"
        )
    # -P: a checkout in the current folder must not hide the installed package, by which vLLM finds the model class.
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", settings.theta]
    command += ["--hf-overrides", json.dumps(config_overrides(settings))]
    if "--logprobs-mode" not in names:
        command += ["--logprobs-mode", "processed_logprobs"]
    return [*command, *flags]


def pairs_command(theta: str, flags: Sequence[str]) -> list[str]:
    """The API server of one model in both roles: two requests are one rollout, see `native.route`.

    Raises:
        ValueError: `flags` that pairs do not work with.
    """
    refuse_flags(flags)
    folder = Path(theta)  # clients find the tokenizer by the path that the server names
    theta = str(folder.resolve()) if folder.is_dir() else theta
    processor = "dual_rollout.native.processor"
    command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", theta]
    command += [
        "--logits-processors",
        f"{processor}:PairProcessor",
        "--worker-extension-cls",
        f"{processor}.PairWorker",
    ]
    command += ["--scheduler-cls", "dual_rollout.native.scheduler.pair_scheduler"]
    command += ["--middleware", "dual_rollout.native.route.PairsMiddleware"]
    if "--enable-lora" in names_of(flags) and "--max-loras" not in names_of(flags):
        command += ["--max-loras", "2"]  # see `PairServer.check_adapters`
    return [*command, *flags]


def config_overrides(settings: NativeSettings) -> dict[str, Any]:
    """What π_θ's configuration is overridden with; `dual_rollout` is what the model class reads."""
    theta, t = (_read_config(model) for model in (settings.theta, settings.t))
    vocab_size = min(theta["vocab_size"], t["vocab_size"])
    _check_same_tokens(settings, vocab_size)
    return {
        "architectures": [ARCHITECTURE],
        "vocab_size": vocab_size + NUM_PSEUDO_TOKENS,
        "dual_rollout": {
            "t": settings.t,
            "architectures": theta["architectures"],
            "vocab_size_theta": theta["vocab_size"],
            "fixed_alpha": settings.fixed_alpha,
            "alpha_min": settings.alpha_min,
            "alpha_max": settings.alpha_max,
            "temperature": settings.temperature,
        },
    }


def _read_config(model: str) -> dict[str, Any]:
    config, _ = PretrainedConfig.get_config_dict(model)
    missing = [key for key in ("vocab_size", "architectures", "hidden_size") if not config.get(key)]
    if missing:
        raise ValueError(
            f"the configuration of {model!r} has no {', '.join(missing)} at its top level: the native engine takes "
            "plain text decoders. Serve this model on a server of its own, with engine: dual."
        )
    return config


def _check_same_tokens(settings: NativeSettings, vocab_size: int) -> None:
    try:
        theta, t = (AutoTokenizer.from_pretrained(model).get_vocab() for model in (settings.theta, settings.t))
    except (OSError, ValueError) as error:
        print(f"dual-rollout: warning: tokenizers not compared: {error}", file=sys.stderr)
        return

    def known(vocab: dict[str, int]) -> dict[str, int]:
        return {token: token_id for token, token_id in vocab.items() if token_id < vocab_size}

    if beyond := {token for token, token_id in (theta | t).items() if token_id >= vocab_size}:
        print(
            f"dual-rollout: warning: {len(beyond)} tokens ({', '.join(sorted(beyond)[:3])}) are beyond the "
            f"{vocab_size} ids that both models know: they are never sampled, and our client refuses them in prompts",
            file=sys.stderr,
        )
    compared = compare_vocabularies(*(Vocabulary(known(vocab), {}, None) for vocab in (theta, t)))
    if compared.differences:
        raise ValueError(
            f"{settings.theta} and {settings.t} do not speak the same tokens: {'; '.join(compared.differences)}. "
            "q* needs two models with the same token ids"
        )
    for note in compared.notes:
        print(f"dual-rollout: warning: tokenizers: {note}", file=sys.stderr)
