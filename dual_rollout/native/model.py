"""The vLLM model class that holds π_θ and π_t side by side. To vLLM it is π_θ; π_t's logits of the same rows are for
the logits processor, which asks `target_logits` for them."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from vllm.compilation.backends import set_model_tag
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models.interfaces import has_inner_state
from vllm.model_executor.models.utils import maybe_prefix
from vllm.transformers_utils.config import get_config

_T_PREFIX = "dual_rollout_t."
_LAYER_LISTS = (
    "ignore",
    "ignored_layers",
    "exclude",
    "exclude_modules",
    "modules_to_not_convert",
    "modules_in_block_to_quantize",
)

_served: list[DualRolloutForCausalLM] = []


def target_logits() -> Tensor:
    """`(B, V_t)` float32 of π_t, for the rows whose π_θ logits were computed last. A process serves one model."""
    return _served[0].logits_t()


class DualRolloutForCausalLM(nn.Module):
    """π_θ and π_t in one engine, each with its own KV cache entries; both read all that either sees.

    The served configuration is π_θ's with `dual_rollout` added, see `native.serving`. Weights without a prefix are
    π_θ's, at start and in every later update; π_t's are read once, as vLLM's `secondary_weights`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        served = vllm_config.model_config.hf_config
        settings = served.dual_rollout
        config_theta = copy.deepcopy(served)
        model_config = vllm_config.model_config
        config_t = get_config(settings["t"], model_config.trust_remote_code)
        architectures = settings["architectures"], config_t.architectures
        _refuse_what_does_not_work(vllm_config, (config_theta, config_t), architectures)

        self.theta: Any
        self.t: Any
        self._vocab_size_t = config_t.vocab_size
        self._t_has_fewer_tokens = config_t.vocab_size < config_theta.vocab_size
        self.theta = _submodel(vllm_config, config_theta, architectures[0], maybe_prefix(prefix, "theta"))
        with set_model_tag("dual_rollout_t"):  # or it would find π_θ's graphs in the cache of compiled ones
            self.t = _submodel(vllm_config, config_t, architectures[1], maybe_prefix(prefix, "t"))
        self._hidden_size_theta = config_theta.hidden_size
        self._hidden_size_t = config_t.hidden_size
        self._hidden_t: Tensor | None = None
        self.secondary_weights: tuple[Any, ...] = (
            DefaultModelLoader.Source(settings["t"], revision=None, prefix=_T_PREFIX),
        )
        _served[:] = [self]

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.theta.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        """Both last hidden states, `(N, H_θ + H_t)`.

        CUDA graphs replay on the memory they were captured with. So each model gets the runner's own buffer of token
        ids, and π_θ's result is copied before π_t runs, whose graphs may use that memory again. Tokens that π_t lacks
        are another to it: its logits of such rows are not used.
        """
        size = self._hidden_size_theta
        hidden_theta = self.theta(input_ids, positions)
        hidden = hidden_theta.new_empty(len(hidden_theta), size + self._hidden_size_t)
        hidden[:, :size] = hidden_theta
        if self._t_has_fewer_tokens:
            input_ids.clamp_(max=self._vocab_size_t - 1)
        hidden[:, size:] = self.t(input_ids, positions)
        return hidden

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """π_θ's logits. What π_t's are made of is kept: those of the rows that vLLM samples from are the last that it
        computes before it calls the logits processors."""
        self._hidden_t = hidden_states[:, self._hidden_size_theta :]
        return self.theta.compute_logits(hidden_states[:, : self._hidden_size_theta].contiguous())

    def logits_t(self) -> Tensor:
        """See `target_logits`. With tensor parallelism every rank asks, or none, since each sees the same requests."""
        assert self._hidden_t is not None
        return self.t.compute_logits(self._hidden_t.contiguous()).float()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load π_θ's weights under their checkpoint names, all or some; π_t's only at the start."""
        loaded = set()
        for is_t, group in groupby(weights, key=lambda item: item[0].startswith(_T_PREFIX)):
            name, model = ("t", self.t) if is_t else ("theta", self.theta)
            names = model.load_weights((key.removeprefix(_T_PREFIX), tensor) for key, tensor in group)
            loaded |= {f"{name}.{key}" for key in names}
            if is_t:
                self.secondary_weights = ()
        return loaded

    def process_weights_after_loading(self) -> None:
        """Take π_t out of the tree of modules: a weight update takes every module in it apart, and this one is frozen.

        vLLM calls this when all weights are loaded and every layer is processed.
        """
        self.t.eval()
        self.__dict__["t"] = self._modules.pop("t")


def _submodel(vllm_config: VllmConfig, config: PretrainedConfig, architectures: list[str], prefix: str) -> Any:
    sub = vllm_config.with_hf_config(config, architectures=architectures)
    sub.model_config.hf_text_config = sub.model_config.hf_config.get_text_config()
    sub.model_config.model_arch_config = sub.model_config.get_model_arch_config()
    return initialize_model(vllm_config=sub, prefix=prefix)


def _refuse_what_does_not_work(
    vllm_config: VllmConfig, configs: tuple[PretrainedConfig, PretrainedConfig], architectures: tuple[list[str], ...]
) -> None:
    """Raise `ValueError` for what two models in one engine cannot do."""
    theta, t = configs
    limit = getattr(t, "max_position_embeddings", None)
    model_config = vllm_config.model_config
    max_model_len = model_config.max_model_len
    classes = [model_config.registry.resolve_model_cls(names, model_config)[0] for names in architectures]
    reasons = {
        "pipeline parallelism (--pipeline-parallel-size): both models must be on every rank": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "expert parallelism (--enable-expert-parallel)": vllm_config.parallel_config.enable_expert_parallel,
        "LoRA (--enable-lora): sync full or merged weights": vllm_config.lora_config is not None,
        "speculative decoding (--speculative-config)": vllm_config.speculative_config is not None,
        "prompt embeddings (--enable-prompt-embeds)": model_config.enable_prompt_embeds,
        f"--load-format {vllm_config.load_config.load_format}: it does not read the target's weights": (
            not isinstance(get_model_loader(vllm_config.load_config), DefaultModelLoader)
        ),
        "full CUDA graphs for prompts: set cudagraph_mode to FULL_AND_PIECEWISE, vLLM's default, or PIECEWISE": (
            vllm_config.compilation_config.cudagraph_mode.mixed_mode() == CUDAGraphMode.FULL
        ),
        "models with a recurrent state (Mamba and hybrids)": any(map(has_inner_state, classes)),
        "quantisation of one model only: give both the same quantization_config, or none": (
            _quantization(theta) != _quantization(t)
        ),
        "quantisation of a list of layers: here their names begin with theta. and t.": _names_layers(theta),
        f"--max-model-len {max_model_len}: the target's context is {limit}": max_model_len > (limit or max_model_len),
    }
    refused = [reason for reason, applies in reasons.items() if applies]
    if refused:
        raise ValueError("dual-rollout's native engine does not work with " + "; nor with ".join(refused))


def _quantization(config: PretrainedConfig) -> Any:
    settings: Any = getattr(config, "quantization_config", None)
    return settings.to_dict() if hasattr(settings, "to_dict") else settings


def _names_layers(config: PretrainedConfig) -> bool:
    settings = _quantization(config) or {}
    return any(settings.get(key) for key in _LAYER_LISTS)
