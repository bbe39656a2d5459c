"""The weights of the policy as a plain transformers model, which is what its server loads.

A trainer holds the policy in wrappers: torch.compile's, accelerate's, PEFT's. Here they are looked through, and
adapters are merged by PEFT itself. What a plain model cannot hold is refused with the reason.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from torch import nn

_COMPILED = "_orig_mod."  # what torch.compile puts into names


def unwrapped(model: Any, accelerator: Accelerator) -> Any:
    """The model as it was made: without what accelerate and torch.compile have put around it."""
    return accelerator.unwrap_model(model, keep_torch_compile=False)


def trained_tensors(trainer: Any) -> dict[str, torch.Tensor]:
    """All tensors of the trainer's model, gathered where it is sharded (in the main process then), by its own names.

    Every process calls it.
    """
    tensors = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return {name.replace(_COMPILED, ""): tensor for name, tensor in tensors.items()}


@contextlib.contextmanager
def policy_weights(trainer: Any) -> Iterator[tuple[Any, dict[str, torch.Tensor]]]:
    """The policy as a plain model: an object with `save_pretrained`, and the tensors to save, by its names.

    Every process enters it. Inside, an adapter is merged into the trainer's model, which must not be trained there.

    Raises:
        ValueError: a plain model cannot be this policy (`why_not_disk`).
    """
    model = unwrapped(trainer.model, trainer.accelerator)
    if not is_peft_model(model):
        yield model, trained_tensors(trainer)
        return
    if reason := _why_not_merged(model):
        raise ValueError(reason)
    with merged(model) as base:
        yield base, plain_tensors(base)


def with_tied_head(model: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors to save with the output embedding as one of its own, though the model ties it to the input's.

    vLLM's CPU build (0.32) packs a tied head when it starts, and goes on with the old one after a reload that does not
    name it. It costs a folder as much again as the embeddings.
    """
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return tensors
    name = next(name for name, module in model.named_modules() if module is head) + ".weight"
    return {**tensors, name: tensors[name].clone()}


def why_not_disk(model: Any, accelerator: Accelerator) -> str | None:
    """Why a plain model cannot be the policy that `model` is; None when it can. An adapter is merged to find out."""
    if getattr(model, "is_quantized", False):
        return "the trainer holds them quantised; train an adapter with dual_weight_sync=lora"
    if not is_peft_model(model):
        if getattr(model, "_hf_peft_config_loaded", False):
            return "the adapter was added by transformers' add_adapter; give the trainer a peft_config or a PeftModel"
        return None
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    if accelerator.distributed_type == DistributedType.FSDP or (deepspeed is not None and deepspeed.zero_stage == 3):
        return "an adapter cannot be merged into sharded weights; set dual_weight_sync=lora"
    if reason := _why_not_merged(model):
        return reason
    try:
        with merged(model) as base:
            plain_tensors(base)
    except Exception as error:  # whatever each kind of adapter raises
        return f"PEFT cannot merge the {_kinds(model)} adapter: {error}"
    return None


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The base model with the active adapters merged into it; afterwards every weight is back, bit for bit.

    Adding and subtracting the adapter would leave rounding errors in the base model, more with every sync.
    """
    layers = _tuner_layers(model)
    weights = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
    originals = [weight.detach().to("cpu", copy=True) for weight in weights]
    try:
        model.merge_adapter()
        yield model.get_base_model()
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def plain_tensors(base: nn.Module) -> dict[str, torch.Tensor]:
    """What `base.state_dict()` would be if nobody had wrapped any of its modules; adapters must be merged."""
    tensors: dict[str, torch.Tensor] = {}
    _collect(base, "", tensors)
    return tensors


def _collect(wrapped: nn.Module, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    module = _inside(wrapped)
    for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
        tensors[prefix + name] = parameter.detach()
    for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
        if name not in module._non_persistent_buffers_set:
            tensors[prefix + name] = buffer
    for name, child in module._modules.items():  # not named_children, which gives a shared child once
        if child is not None:
            _collect(child, f"{prefix}{name}.", tensors)


def _inside(module: Any) -> Any:
    """The module of the plain model that this one stands for."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper

    while True:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        elif isinstance(module, TrainableTokensWrapper):
            module = module.token_adapter
        elif isinstance(module, ModulesToSaveWrapper):
            active = [name for name in module.active_adapters if name in module.modules_to_save]
            module = module.modules_to_save[active[0]] if active else module.original_module
        elif _COMPILED.rstrip(".") in module._modules:
            module = module.get_submodule("_orig_mod")
        else:
            return module


def _tuner_layers(model: nn.Module) -> list[Any]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _why_not_merged(model: Any) -> str | None:
    """What can be said of a PEFT model before its adapter is merged."""
    kinds = _kinds(model)
    if model.active_peft_config.is_prompt_learning:
        return f"the {kinds} adapter puts virtual tokens or keys before the prompt, which no server does: train LoRA"
    if any(kind in _DEPEND_ON_THE_INPUT for kind in kinds.split(", ")):
        return f"what the {kinds} adapter adds depends on the input, so no weights hold it: train LoRA"
    if apart := _trained_apart(model.get_base_model()):
        return (
            f"the adapter trains {' and '.join(apart)}, and the served model has one tensor for both "
            "(tie_word_embeddings): leave them out of target_modules and modules_to_save, set ensure_weight_tying=True "
            "for modules_to_save, or untie the model's embeddings and serve that"
        )
    return None


_DEPEND_ON_THE_INPUT = frozenset({"XLORA", "POLY", "ADAPTION_PROMPT", "SHADOW"})


def _kinds(model: Any) -> str:
    kinds = [model.peft_config[name].peft_type for name in model.active_adapters]
    return ", ".join(str(getattr(kind, "value", kind)) for kind in kinds)


def adapted_embeddings(base: Any) -> list[str]:
    """Names of those of a PEFT model's embeddings, of tokens and of the output, that an adapter adds to."""
    return [name for name, module in _embeddings(base).items() if _tuner_layers(module)]


def _trained_apart(base: Any) -> list[str]:
    """Names of a tied pair of embeddings that the adapter changes otherwise than together; none where it does not.

    A tied tensor in two roles gets both their changes when they are merged. Trained tokens are the same in both.
    """
    from peft.utils.other import TrainableTokensWrapper

    if not getattr(base.config.get_text_config(), "tie_word_embeddings", False):
        return []
    roles = _embeddings(base)
    weights: list[Any] = [_inside(module).weight for module in roles.values()]
    together = len({weight.data_ptr() for weight in weights}) == 1
    added = [module for module in roles.values() if _tuner_layers(module)]
    return [] if together and all(isinstance(module, TrainableTokensWrapper) for module in added) else list(roles)


def _embeddings(base: Any) -> dict[str, nn.Module]:
    roles = [base.get_input_embeddings(), base.get_output_embeddings()]
    return {name: module for name, module in base.named_modules() if any(module is role for role in roles)}
