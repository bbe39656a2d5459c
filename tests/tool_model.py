"""A tiny policy and a nearby target that call tools: single tokens of their vocabulary are whole calls, and likely.

The rest is as in `tiny_model`: random, so that every distribution depends on all of the context.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AddedToken, AutoModelForCausalLM, PreTrainedTokenizerFast
from trl.chat_template_utils import qwen3_template

from tests.tiny_model import make_tiny_model, make_tokenizer, perturbed_copy

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool['function']['name'] }} {% endfor %}"
    "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}<tool_call>\n{{ call['function'] | tojson }}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_CALL, _END = 4.0, 4.8  # times about 1.5: nats that a call and the end of a turn are likelier by than other tokens


def call(name: str, **arguments: Any) -> str:
    """The text of a call, as `qwen3_template` reads it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def make_tool_pair(folder: Path, calls: list[str]) -> tuple[Path, Path]:
    """The folders of a policy and a target to which each of `calls` is one token."""
    tokenizer = tool_tokenizer(calls)
    theta = make_tiny_model(folder / "theta", logit_scale=1.5, vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(theta, dtype=torch.float32)
    with torch.no_grad():  # the first channel is the same in every position, and the output layer reads it
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = layer.mlp.down_proj.weight[0] = 0.0
        model.model.embed_tokens.weight[:, 0] = 3.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(calls), 0] = _CALL
        model.lm_head.weight[tokenizer.eos_token_id, 0] = _END
    model.save_pretrained(theta)
    t = perturbed_copy(theta, folder / "t", noise=0.2)
    for saved in (theta, t):
        tokenizer.save_pretrained(saved)
    return theta, t


def tool_tokenizer(calls: list[str]) -> PreTrainedTokenizerFast:
    """`make_tokenizer`, with calls."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in calls])
    tokenizer.chat_template = TEMPLATE
    tokenizer.response_template = qwen3_template
    return tokenizer
