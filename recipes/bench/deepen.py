"""Make a deeper model close to a given one, without a download: for benchmarks of a large π_t beside a small π_θ.

    python recipes/bench/deepen.py MODEL OUT --times 4

After every decoder layer come copies of it whose outputs into the residual stream are scaled down, so that the deeper
model costs `times` as much and says nearly the same. Works for models with Llama's layer names (Llama, Qwen2/3,
Mistral, SmolLM2).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def deepen(model: torch.nn.Module, times: int, scale: float) -> torch.nn.Module:
    layers = []
    for layer in model.model.layers:
        layers.append(layer)
        for _ in range(times - 1):
            extra = copy.deepcopy(layer)
            with torch.no_grad():
                extra.self_attn.o_proj.weight.mul_(scale)
                extra.mlp.down_proj.weight.mul_(scale)
            layers.append(extra)
    for index, layer in enumerate(layers):
        layer.self_attn.layer_idx = index
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [kind for kind in model.config.layer_types for _ in range(times)]
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name of the small model")
    parser.add_argument("out", type=Path, help="folder of the deeper one")
    parser.add_argument("--times", type=int, default=4, help="how many times as deep")
    parser.add_argument("--scale", type=float, default=0.04, help="of the extra layers' outputs")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    deepen(model, args.times, args.scale).save_pretrained(args.out)
    AutoTokenizer.from_pretrained(args.model).save_pretrained(args.out)
    print(f"{args.out}: {model.config.num_hidden_layers} layers")


if __name__ == "__main__":
    main()
