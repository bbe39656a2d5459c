"""One batched forward over a ragged batch of new tokens, with no padding anywhere.

All new tokens of all sequences form one row of shape ``(1, total)``. The linear layers see one large batch; a
custom attention function, registered with transformers, lets each sequence attend to its own key/value rows
only. Prefill, chunks of a prefill and single decoded tokens mix freely, and a token's log-probabilities do
not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dual_rollout.server.adapters import Adapters
from dual_rollout.server.prefix_cache import KVSequence, KVShape

ATTENTION_NAME = "dual_rollout_ragged"
SELF_TEST_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.5}


@dataclass
class Chunk:
    """New tokens of one sequence in one step.

    ``rows`` are the positions within the chunk whose logits are wanted. Rows that the sequence already holds
    are computed again for their logits but not written.
    """

    sequence: KVSequence
    start: int
    token_ids: list[int]
    rows: list[int]


@dataclass
class _ChunkViews:
    """Where one chunk reads and writes, per layer."""

    begin: int
    end: int
    mask: torch.Tensor | None
    reads: tuple[torch.Tensor, ...]
    first_written: int
    writes: tuple[torch.Tensor, ...] | None


@dataclass
class RaggedAttention:
    """The attention function; ``views`` describes the step in progress."""

    views: list[_ChunkViews] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``query (1, Hq, T, D)``, ``key`` and ``value (1, Hkv, T, D)`` to ``(1, T, Hq, D)``."""
        if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
            raise RuntimeError("its attention has a soft cap or sinks")
        layer: int = module.layer_idx  # type: ignore[assignment]
        num_kv_heads, head_dim = key.shape[1], query.shape[3]
        fresh = torch.stack((key[0], value[0]))
        # The query heads that share a key/value head act as extra query positions: grouped-query attention
        # without repeating keys and values.
        grouped = query[0].transpose(0, 1).reshape(query.shape[2], num_kv_heads, -1, head_dim)
        output = torch.empty_like(grouped)
        for view in self.views:
            new = slice(view.begin, view.end)
            if view.writes is not None:
                view.writes[layer].copy_(fresh[:, :, view.first_written : view.end])
            keys, values = view.reads[layer].unsqueeze(1).unbind(0)
            queries = grouped[new].permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, head_dim)
            result = torch.nn.functional.scaled_dot_product_attention(
                queries, keys, values, attn_mask=view.mask, scale=scaling
            )
            output[new] = result.view(num_kv_heads, -1, view.end - view.begin, head_dim).permute(2, 0, 1, 3)
        return output.view(1, query.shape[2], -1, head_dim), None


class ModelRunner:
    """Owns the model. Every method must be called from one thread."""

    def __init__(self, model_path: str, *, dtype: str, max_model_len: int | None) -> None:
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        self.max_model_len = _check_config(config, max_model_len)
        self.dtype = _resolve_dtype(config, dtype)
        self._attention = RaggedAttention()
        AttentionInterface.register(ATTENTION_NAME, self._attention)
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=self.dtype, attn_implementation="eager", use_safetensors=True, trust_remote_code=False
        )
        self.model.eval().requires_grad_(False)
        if not getattr(self.model, "_supports_attention_backend", False):
            raise ValueError(
                f"{type(self.model).__name__} does not go through transformers' attention interface, "
                "which the "
                "embedded server needs; serve it with vLLM"
            )
        self.vocab_size: int = config.vocab_size
        self.kv_shape = KVShape(
            num_layers=config.num_hidden_layers,
            num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            dtype=self.dtype,
        )
        self.adapters = Adapters(self.model)
        self._self_test()

    @torch.inference_mode()
    def forward(self, chunks: list[Chunk], adapter: str | None = None) -> torch.Tensor:
        """Logits ``(R, V)`` in float32 of the wanted rows, chunk by chunk; the buffers must have room."""
        self.adapters.use(adapter)
        token_ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        self._attention.views = []
        for chunk in chunks:
            begin = len(token_ids)
            rows.extend(begin + row for row in chunk.rows)
            token_ids.extend(chunk.token_ids)
            positions.extend(range(chunk.start, chunk.start + len(chunk.token_ids)))
            self._attention.views.append(_chunk_views(chunk, begin, self._groups))
        output = self.model(
            input_ids=torch.tensor([token_ids]),
            position_ids=torch.tensor([positions]),
            use_cache=False,
            logits_to_keep=torch.tensor(rows, dtype=torch.long),
        )
        self._attention.views = []
        return output.logits[0].float()

    @property
    def _groups(self) -> int:
        return self.model.config.num_attention_heads // self.kv_shape.num_kv_heads

    def _self_test(self) -> None:
        """Refuse a model whose attention is not what we compute (sinks, soft caps, other masks...)."""
        generator = torch.Generator().manual_seed(0)
        length = min(24, self.max_model_len)
        token_ids = torch.randint(self.vocab_size, (length,), generator=generator).tolist()
        with torch.inference_mode():
            expected = self.model(input_ids=torch.tensor([token_ids]), use_cache=False).logits[0].float()
        self.model.set_attn_implementation(ATTENTION_NAME)
        sequence = KVSequence(0, None, np.zeros(length, dtype=np.int32), self.kv_shape.allocate(length))
        pieces = [token_ids[: length // 2], *([token] for token in token_ids[length // 2 :])]
        parts = []
        try:
            for piece in filter(None, pieces):
                parts.append(self.forward([Chunk(sequence, sequence.length, piece, list(range(len(piece))))]))
                sequence.length += len(piece)
        except (RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"the embedded server cannot run {type(self.model).__name__}: {error}") from error
        got = torch.cat(parts).log_softmax(-1)
        difference = (got - expected.log_softmax(-1)).abs().max().item()
        if not difference <= SELF_TEST_TOLERANCE[self.dtype]:
            raise ValueError(
                f"the embedded server computes {type(self.model).__name__} wrongly (log-probabilities "
                "differ by "
                f"{difference:.2g} from transformers' own forward); serve it with vLLM"
            )


def _chunk_views(chunk: Chunk, begin: int, groups: int) -> _ChunkViews:
    new = len(chunk.token_ids)
    end = chunk.start + new
    mask = None
    if new > 1:
        mask = torch.arange(end) <= torch.arange(chunk.start, end).unsqueeze(1)
        mask = mask.repeat(groups, 1)
    buffer = chunk.sequence.buffer
    held = max(chunk.start, chunk.sequence.length)
    return _ChunkViews(
        begin=begin,
        end=begin + new,
        mask=mask,
        reads=buffer[:, :, :, :end].unbind(0),
        first_written=begin + held - chunk.start,
        writes=buffer[:, :, :, held:end].unbind(0) if held < end else None,
    )


def _check_config(config: Any, max_model_len: int | None) -> int:
    """The context length to serve; ValueError for models whose state is not plain keys and values."""
    name = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder model; the embedded server runs decoder-only models")
    limit = getattr(config, "max_position_embeddings", None)
    if max_model_len is None and limit is None:
        raise ValueError(f"the config of {name} states no context length; set --max-model-len")
    if max_model_len is not None and limit is not None and max_model_len > limit:
        raise ValueError(f"--max-model-len {max_model_len} is above the model's max_position_embeddings {limit}")
    length: int = max_model_len or limit  # type: ignore[assignment]
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := layer_types - {"full_attention", "sliding_attention"}:
        raise ValueError(f"{name} has layers without plain key/value state ({sorted(other)}); serve it with vLLM")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layer_types or getattr(config, "layer_types", None) is None
    if window is not None and slides and window < length:
        raise ValueError(
            f"{name} has a sliding window of {window} tokens; set --max-model-len to at most {window}, "
            "or serve it with vLLM"
        )
    return length


def _resolve_dtype(config: Any, dtype: str) -> torch.dtype:
    """``auto`` keeps float32 and bfloat16 checkpoints as they are and widens anything else to float32."""
    if dtype == "auto":
        return torch.bfloat16 if getattr(config, "dtype", None) == torch.bfloat16 else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
