"""Make the models of the benchmarks, without a download: a tiny pair, and a nearby copy of any model.

    python recipes/bench/tiny_pair.py tiny MODEL THETA T
    python recipes/bench/tiny_pair.py noised MODEL OUT --noise 0.12

`tiny` saves two random Llamas of two layers that have MODEL's tokenizer and the whole of its vocabulary: what remains
of a token's cost is that of the requests, of the vocabulary and of q*. `noised` saves MODEL with Gaussian noise on
every matrix, `--noise` times the matrix's own deviation; `tiny` makes T from THETA in the same way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

LOGIT_SCALE = 4.0  # deviation of the logits: entropies of some three nats over 49,152 tokens, like a language model's


def tiny_llama(vocab_size: int, eos_token_id: int, seed: int) -> LlamaForCausalLM:
    """Two layers of width 64, so that a token's cost is that of asking; logits of a trained model's size."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=eos_token_id,
    )
    generator = torch.Generator().manual_seed(seed)
    model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                continue  # norms are ones
            fan_in = 1 if "embed_tokens" in name else parameter.shape[1]
            scale = LOGIT_SCALE if "lm_head" in name else 1.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale / fan_in**0.5)
    return model


def add_noise(model: PreTrainedModel, noise: float, seed: int) -> None:
    """In place, on every matrix; those that are tied get it once."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * noise * parameter.std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("tiny", "noised"):
        command = commands.add_parser(name)
        command.add_argument("model", help="folder or hub name" + (" whose tokenizer is used" * (name == "tiny")))
        if name == "tiny":
            command.add_argument("theta", type=Path, help="folder of the tiny policy")
        command.add_argument("out", type=Path, metavar="T" if name == "tiny" else "OUT", help="folder of the copy")
        command.add_argument("--noise", type=float, default=0.12, help="in the copy, of each matrix's deviation")
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.command == "tiny":
        model: PreTrainedModel = tiny_llama(len(tokenizer), tokenizer.eos_token_id, args.seed)
        model.save_pretrained(args.theta)
        tokenizer.save_pretrained(args.theta)
    else:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    add_noise(model, args.noise, args.seed + 1)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters() / 1e6:.0f} million parameters")


if __name__ == "__main__":
    main()
