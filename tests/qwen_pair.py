"""The math recipe's pair, Qwen2.5's 1.5B and 7B, in tiny widths: their vocabularies and the layout of the ids.

Both have one tokenizer of 151,665 tokens. The smaller model has 151,936 rows, its output tied to its input, and the
larger 152,064. Here the larger gives much of its mass to the 128 ids that the smaller has not, which real ones hardly
do: a rollout that lets one of them through shows.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dual_rollout import CoordinatorConfig, DualVLLMCoordinator, GenerationOutput
from tests.exact_distribution import position_distribution
from tests.hang import HANG
from tests.tiny_model import make_tokenizer

SHORT, LONG = 151_936, 152_064
BYTES = 256
MERGED = 151_643  # tokens of the byte-level BPE; the added ones follow
ADDED_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
HIDDEN, LAYERS = 64, 2
PROMPTS, TOKENS = ["what is 2 and 2?", [7, 8, 9], [MERGED + 1, 20, SHORT - 1]], 4
LIKELY, UNLIKELY = 5.5, 0.5  # standard deviations of logits: of bytes and the larger model's own ids, and of the rest


def make_qwen_pair(folder: Path) -> tuple[Path, Path]:
    """Save the policy and the target; the latter is the former with noise and 128 more rows."""
    tokenizer = make_tokenizer(merged=MERGED, special_tokens=ADDED_TOKENS, pad="<|endoftext|>")
    generator = torch.Generator().manual_seed(0)
    policy, target = (Qwen2ForCausalLM(_config(rows, tied=rows == SHORT)).float() for rows in (SHORT, LONG))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
            elif parameter.dim() == 1:
                parameter.zero_()
            else:
                # What the layers add outweighs the token's own embedding, which in a tied model speaks for itself.
                scale = 3.0 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / parameter.shape[1] ** 0.5)
        embedding = policy.model.embed_tokens.weight
        embedding[:BYTES] *= LIKELY
        embedding[BYTES:] *= UNLIKELY
        for name, parameter in target.named_parameters():
            source = embedding if name == "lm_head.weight" else policy.get_parameter(name)
            noise = torch.randn(source.shape, generator=generator) * 0.1 * (source.std() if source.dim() == 2 else 0.0)
            parameter[: len(source)] = source + noise
        target.model.embed_tokens.weight[SHORT:] = 0.0  # no prompt has them
        target.lm_head.weight[SHORT:] = torch.randn(LONG - SHORT, HIDDEN, generator=generator) * LIKELY / HIDDEN**0.5
    for model, name in ((policy, "1.5B"), (target, "7B")):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder / "1.5B", folder / "7B"


def _config(rows: int, *, tied: bool) -> Qwen2Config:
    end_of_text, end_of_turn = (MERGED + ADDED_TOKENS.index(token) for token in ("<|endoftext|>", "<|im_end|>"))
    return Qwen2Config(
        vocab_size=rows,
        tie_word_embeddings=tied,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,  # of 32, the smallest that vLLM's CPU attention knows
        num_key_value_heads=1,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=end_of_text,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )


def check_rollouts(policy: Path, target: Path, *urls: str, **options: Any) -> None:
    """Draw a few sequences from the servers at `urls`, two or a native one, and compare all that is recorded of them.

    The reference is a plain forward of both models. On two servers α and q* are those of the lists that `options` ask
    for. A native server has q* over the whole vocabulary that both share, which is compared for the α that it recorded.
    """
    outputs = asyncio.run(asyncio.wait_for(_rollouts(urls, options), HANG))
    assert [output.error for output in outputs] == [None] * len(PROMPTS)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (policy, target)]
    lacked = 0.0  # the most that the target gave to ids which the policy lacks
    for output in outputs:
        tokens, start = output.generated_tokens, len(output.prompt_token_ids)
        assert len(tokens) == TOKENS and max(tokens) < SHORT
        text = torch.tensor([[*output.prompt_token_ids, *tokens]])
        with torch.no_grad():
            rows = [model(text).logits[0, start - 1 : -1].double().softmax(-1).numpy() for model in models]
        for i, (token, p, r) in enumerate(zip(tokens, *rows, strict=True)):
            lacked = max(lacked, r[SHORT:].sum())
            alpha, log_q = output.alpha_history[i], output.logprobs_q[i]
            expected_alpha, expected_log_q = _expected(p, r, token, alpha, options)
            assert alpha == pytest.approx(expected_alpha, abs=1e-3)
            assert log_q == pytest.approx(expected_log_q, abs=2e-3)
            assert output.logprobs_theta[i] == pytest.approx(math.log(p[token]), abs=1e-3)
            assert output.logprobs_t[i] == pytest.approx(math.log(r[token]), abs=1e-3)
            assert output.importance_weights[i] == pytest.approx(math.exp(output.logprobs_theta[i] - log_q), rel=1e-9)
    assert lacked > 0.1, "the test needs that such ids are likely"


async def _rollouts(urls: tuple[str, ...], options: dict[str, Any]) -> list[GenerationOutput]:
    servers = {"theta_url": urls[0], **({"t_url": urls[1]} if len(urls) == 2 else {"engine": "native"})}
    config = CoordinatorConfig(**servers, seed=3, ignore_eos=True, **options)
    async with DualVLLMCoordinator(config) as coordinator:
        return await coordinator.generate_batch(PROMPTS, max_tokens=TOKENS)


def _expected(p: np.ndarray, r: np.ndarray, token: int, alpha: float, options: dict[str, Any]) -> tuple[float, float]:
    """α and log q* of a token; on a native server the q* of the recorded α."""
    if options:
        alpha, q = position_distribution(p, r, options)
        return alpha, math.log(q[token])
    log_p, log_r = np.log(p[:SHORT]), np.log(r[:SHORT])
    path = (1 - alpha) * log_p + alpha * log_r
    return alpha, float(path[token] - np.logaddexp.reduce(path))
