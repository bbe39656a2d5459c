"""The ragged forward of the embedded server on several model families, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from dual_rollout.server.model_runner import Chunk, ModelRunner  # noqa: E402
from dual_rollout.server.prefix_cache import KVSequence  # noqa: E402

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def _save(folder: Path, config: Any) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        transformers.LlamaConfig(**SIZES),
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=True),
        transformers.Qwen2Config(**SIZES),
        transformers.Qwen3Config(**SIZES, head_dim=16),
        transformers.MistralConfig(**SIZES, sliding_window=None),
        transformers.MistralConfig(**SIZES, sliding_window=64),
        transformers.GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    ],
    ids=["llama", "llama-tied", "qwen2", "qwen3", "mistral", "mistral-wide-window", "gpt2"],
)
def test_mixed_chunks_match_a_plain_forward(config: Any, tmp_path: Path) -> None:
    folder = _save(tmp_path, config)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    runner = ModelRunner(str(folder), dtype="float32", max_model_len=None)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, length).tolist() for length in (1, 5, 33)]
    sequences = [KVSequence(0, None, np.zeros(64, dtype=np.int32), runner.kv_shape.allocate(64)) for _ in prompts]
    got: list[list[Any]] = [[] for _ in prompts]
    # First all but the last token of each prompt, in chunks that end at different places; then one by one.
    plans = [{1: 2, 2: 7}, {0: 1, 1: 2, 2: 25}, {1: 1, 2: 1}]
    for plan in plans:
        chunks = []
        for index, count in plan.items():
            start = sequences[index].length
            token_ids = prompts[index][start : start + count]
            chunks.append(Chunk(sequences[index], start, token_ids, list(range(count))))
        logits = runner.forward(chunks)
        for chunk, index in zip(chunks, plan, strict=True):
            count = len(chunk.token_ids)
            got[index].append(logits[:count])
            logits = logits[count:]
            sequences[index].length += count
    for prompt, parts in zip(prompts, got, strict=True):
        with torch.no_grad():
            expected = reference(torch.tensor([prompt])).logits[0].log_softmax(-1)
        assert (torch.cat(parts).log_softmax(-1) - expected).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.MistralConfig(**SIZES, sliding_window=32), "sliding window of 32"),
        (transformers.Gemma2Config(**SIZES, head_dim=8, sliding_window=64), "soft cap"),
        (transformers.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1), "linear_attention"),
    ],
    ids=["short-window", "soft-cap", "state-space"],
)
def test_models_that_would_be_computed_wrongly_are_refused(config: Any, message: str, tmp_path: Path) -> None:
    folder = _save(tmp_path, config)
    with pytest.raises(ValueError, match=message):
        ModelRunner(str(folder), dtype="float32", max_model_len=64)
