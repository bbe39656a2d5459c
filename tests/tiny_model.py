"""A tiny random Llama with a byte-level BPE tokenizer, made offline in a second or two.

The integration tests serve it. Its vocabulary is small (about 300), so a whole distribution is cheap to write
down and sequences of a few tokens can be enumerated; its distributions have an entropy of 1 to 3 nats, so
sampling is neither uniform nor deterministic.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SPECIAL_TOKENS = ("<pad>", "<|im_start|>", "<|im_end|>")
WORDS = ("the", "and", "ing", "that", "user", "assistant", "system", "what", "is", "of", "to", "in")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_model(
    folder: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_layers: int = 2,
    hidden_size: int = 64,
    max_position_embeddings: int = 512,
    logit_scale: float = 3.0,
    vocab_size: int | None = None,
) -> Path:
    """Save a random Llama (float32, grouped-query attention), its tokenizer and generation config.

    ``vocab_size``, if larger than the tokenizer's, pads the vocabulary with rows that are as likely as any.

    The same arguments give the same weights. ``<|im_end|>`` is the end of sequence. ``logit_scale`` is the
    standard deviation of the logits: 3 leaves entropies of 1.5 to 3 nats. Returns ``folder``.
    """
    folder = Path(folder)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=vocab_size or len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # the smallest that vLLM's CPU attention knows
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.get_vocab()["<|im_start|>"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            # Unit-variance activations everywhere; after the final norm the logits' deviation is the scale.
            fan_in = 1.0 if "embed_tokens" in name else parameter.shape[1]
            scale = logit_scale if "lm_head" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.5)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def perturbed_copy(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, noise: float = 0.1, seed: int = 1
) -> Path:
    """The model of ``source`` with Gaussian noise on every matrix, ``noise`` times its own deviation.

    A nearby target model: same tokenizer, and a total variation of about 0.2 from noise 0.1.
    Returns ``target``.
    """
    target = Path(target)
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std())
    model.save_pretrained(target)
    make_tokenizer().save_pretrained(target)
    return target


def make_tokenizer(
    *, merged: int | None = None, special_tokens: Sequence[str] = SPECIAL_TOKENS, pad: str = "<pad>"
) -> PreTrainedTokenizerFast:
    """256 byte tokens, merges that spell a few words, and the special tokens of ChatML.

    ``merged``, if given, is how many tokens come before the special ones; what no text has fills them up.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        left = word[0]
        for right in word[1:]:
            if left + right not in vocabulary:
                merges.append((left, right))
                vocabulary[left + right] = len(vocabulary)
            left += right
    vocabulary |= {f"unused {index}": index for index in range(len(vocabulary), merged or 0)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special_tokens])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
