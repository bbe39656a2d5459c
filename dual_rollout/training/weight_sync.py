"""Bringing the policy's new weights to its server, before a rollout that is to use them.

Through a folder that trainer and server both see go either all weights (`DiskWeightSync`) or a LoRA adapter alone
(`LoraWeightSync`); with `use_vllm=True` TRL sends them itself (`TrlWeightSync`). π_θ's server drops its prefix cache
with each version; π_t's server is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, is_peft_model
from safetensors.torch import save_file

from dual_rollout.training.processes import fail_together
from dual_rollout.training.rollout import DualRollout

logger = logging.getLogger(__name__)

WeightSyncMethod = Literal["auto", "disk", "lora"]
WEIGHT_SYNC_METHODS: tuple[str, ...] = get_args(WeightSyncMethod)


class WeightSync(Protocol):
    """One way to bring weights to π_θ's server. What fails in the main process raises in all of them."""

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        """Return when the server serves the trainer's weights, with the trainer's global step as their version.

        Called between rollouts by every process; the main process alone writes and asks.

        Raises:
            EngineError: the server cannot see the folder, or cannot load what is in it.
        """
        ...


def choose_weight_sync(trainer: Any, rollout: DualRollout, method: WeightSyncMethod, folder: Path) -> WeightSync:
    """TRL's own way with `use_vllm`; else, for "auto", an adapter where model and server can, and all weights if not.

    Args:
        folder: each version is written to a new folder inside it, which the server must see under the same path.

    Raises:
        ValueError: `method` cannot carry this trainer's weights.
    """
    if method not in WEIGHT_SYNC_METHODS:
        raise ValueError(f"dual_weight_sync must be one of {', '.join(WEIGHT_SYNC_METHODS)}; got {method!r}")
    if trainer.use_vllm:
        return TrlWeightSync()
    model = trainer.accelerator.unwrap_model(trainer.model)
    not_lora, not_disk = why_not_lora(model), why_not_disk(model, trainer.accelerator)
    if method == "auto" and not_lora is None and not_disk is None:
        with fail_together():
            if not rollout.policy_server_loads_lora():
                not_lora = "the server loads none; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    if method == "lora" or (method == "auto" and not_lora is None):
        if not_lora is not None:
            raise ValueError(f"dual_weight_sync=lora is not possible: {not_lora}")
        return LoraWeightSync(folder)
    if not_disk is not None:
        raise ValueError(f"full weights cannot be written for the server: {not_disk}")
    if method == "auto" and is_peft_model(model):
        logger.warning("each weight sync sends the merged model instead of the adapter: %s", not_lora)
    return DiskWeightSync(folder)


def weight_folder(output_dir: str | Path, chosen: str | Path | None) -> Path:
    """Where a run writes versions, and nobody else anything: inside the chosen folder, or else inside the run's.

    A run has the same one when it is started again, so that it can remove what it left.

    Raises:
        ValueError: it is a symbolic link to elsewhere.
    """
    if chosen is None:
        parent, name = Path(output_dir), "theta_weights"
    else:  # where other runs may have theirs
        run = hashlib.sha256(str(Path(output_dir).resolve()).encode()).hexdigest()[:12]
        parent, name = Path(chosen), f"run-{run}"
    folder = parent / name
    if not folder.resolve().is_relative_to(parent.resolve()):
        raise ValueError(f"{folder} leads to {folder.resolve()}: remove the link, or set dual_weight_sync_dir to there")
    return folder


def why_not_lora(model: Any) -> str | None:
    """Why a server with the base model cannot make this model from a LoRA adapter; None when it can."""
    if not is_peft_model(model):
        return "the model has no adapter; give the trainer a peft_config, or set dual_weight_sync=disk"
    config = model.peft_config[model.active_adapters[0]]
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        return f"servers load LoRA adapters, this one is of type {config.peft_type}"
    # vLLM refuses some of these and ignores others without a word, such as ranks and scales per layer.
    used = [name for name in _BEYOND_PLAIN_LORA if getattr(config, name, None)]
    if config.bias != "none":
        used.append(f"bias={config.bias}")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        used.append(f"init_lora_weights={config.init_lora_weights} (it changes the base model)")
    if used:
        return f"servers load plain LoRA adapters, this one uses {', '.join(used)}"
    return None


_BEYOND_PLAIN_LORA = (
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "modules_to_save",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
)


def why_not_disk(model: Any, accelerator: Accelerator) -> str | None:
    """Why the model's full weights cannot be written as a checkpoint for the server; None when they can."""
    if getattr(model, "is_quantized", False):
        return "the trainer holds them quantised; train an adapter with dual_weight_sync=lora"
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    sharded = accelerator.distributed_type == DistributedType.FSDP or (
        deepspeed is not None and deepspeed.zero_stage == 3
    )
    if sharded and is_peft_model(model):
        return "an adapter cannot be merged into sharded weights; set dual_weight_sync=lora"
    return None


class DiskWeightSync:
    """All weights, under the base model's names and with an adapter merged; the folder goes once they are loaded."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._checked = False

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        accelerator, version = trainer.accelerator, trainer.state.global_step
        model = accelerator.unwrap_model(trainer.model)
        with merged(model) as base:
            tensors = accelerator.get_state_dict(trainer.model_wrapped)
            with fail_together():
                if accelerator.is_main_process:
                    named = base_names(tensors) if is_peft_model(model) else tensors
                    self._send(base, named, _version_folder(self._folder, version), rollout)
        rollout.share_policy_weights(version)

    def _send(self, model: Any, tensors: Mapping[str, torch.Tensor], path: Path, rollout: DualRollout) -> None:
        if not self._checked:
            check_visible(self._folder, rollout)
            self._checked = True
        try:
            model.save_pretrained(path, state_dict=tensors)
            _readable(path)
            rollout.reload_policy_weights(str(path))
        finally:
            shutil.rmtree(path, ignore_errors=True)


class LoraWeightSync:
    """The adapter alone. A version's folder stays until the next one is served, for the server may read it again.

    Each version has a new path: a server may take an adapter whose path it knows for the one it has.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        self._served: Path | None = None

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        accelerator, version = trainer.accelerator, trainer.state.global_step
        model = accelerator.unwrap_model(trainer.model)
        name = model.active_adapters[0]
        tensors = accelerator.get_state_dict(trainer.model_wrapped)
        with fail_together():
            if accelerator.is_main_process:
                path = _version_folder(self._folder, version)
                model.save_pretrained(path, state_dict=tensors, selected_adapters=[name], save_embedding_layers=False)
                _readable(path)
                # PEFT gives every adapter but the one named "default" a folder of its own.
                rollout.load_policy_adapter(str(path if name == "default" else path / name))
                if self._served is not None:
                    shutil.rmtree(self._served, ignore_errors=True)
                self._served = path
        rollout.use_policy_adapter()
        rollout.share_policy_weights(version)


class TrlWeightSync:
    """Nothing to do: TRL sends the weights over NCCL, and resets the prefix cache, before it asks for a rollout."""

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        rollout.weight_version = trainer.state.global_step


def check_visible(folder: Path, rollout: DualRollout) -> None:
    """Refuse a folder that π_θ's server does not see, before a reload: a failed one may leave it without weights.

    Raises:
        EngineError: it does not see the folder.
    """
    probe = _version_folder(folder, "probe")
    probe.mkdir(parents=True)
    try:
        save_file({}, probe / "model.safetensors")
        _readable(probe)
        rollout.check_policy_server_sees(str(probe))
    finally:
        shutil.rmtree(probe)


@contextlib.contextmanager
def merged(model: Any) -> Iterator[Any]:
    """The base model with the adapter merged into it; afterwards every weight is back, bit for bit.

    Adding and subtracting the adapter would leave rounding errors in the base model, more with every sync.
    """
    if not is_peft_model(model):
        yield model
        return
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    weights = [parameter for layer in layers for parameter in layer.get_base_layer().parameters()]
    originals = [weight.detach().to("cpu", copy=True) for weight in weights]
    model.merge_adapter()
    try:
        yield model.get_base_model()
    finally:
        model.unmerge_adapter()
        with torch.no_grad():
            for weight, original in zip(weights, originals, strict=True):
                weight.copy_(original)


def base_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a merged PEFT model that make up the base model, under the base model's names."""
    named = {}
    for name, tensor in tensors.items():
        if ".lora_" in name or ".original_module." in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        named[_SAVED_MODULE.sub(".", name)] = tensor
    return named


_SAVED_MODULE = re.compile(r"\.modules_to_save\.[^.]+\.")


def _readable(folder: Path) -> None:
    """Let whom the folder is open to read its files too: safetensors keeps them to the trainer's user."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _version_folder(folder: Path, version: int | str) -> Path:
    """A path that no earlier version, run or attempt has had."""
    return folder.resolve() / f"step-{version}-{secrets.token_hex(4)}"
