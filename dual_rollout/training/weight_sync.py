"""Bringing the policy's new weights to its server, before a rollout that is to use them.

Through a folder that trainer and server both see go either all weights (`DiskWeightSync`) or a LoRA adapter alone
(`LoraWeightSync`); with `use_vllm=True` TRL sends them itself (`TrlWeightSync`). π_θ's server drops its prefix cache
with each version; π_t's server is never touched.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from accelerate.utils import is_peft_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import logging as transformers_logging

from dual_rollout.exceptions import WeightSyncError
from dual_rollout.training.policy_state_dict import (
    adapted_embeddings,
    policy_weights,
    trained_tensors,
    unwrapped,
    why_not_disk,
    with_tied_head,
)
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
            WeightSyncError: they cannot be written.
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
    model = unwrapped(trainer.model, trainer.accelerator)
    not_lora = why_not_lora(model)
    if method == "lora":
        if not_lora is not None:
            raise ValueError(f"dual_weight_sync=lora is not possible: {not_lora}")
        return LoraWeightSync(folder)
    if method == "auto" and not_lora is None:
        with fail_together():
            if rollout.policy_server_loads_lora():
                return LoraWeightSync(folder)
        not_lora = "the server loads none; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
    if not_disk := why_not_disk(model, trainer.accelerator):
        also = f" (nor the adapter alone: {not_lora})" if is_peft_model(model) and method == "auto" else ""
        raise ValueError(f"full weights cannot be written for the server: {not_disk}{also}")
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
    if len(model.active_adapters) != 1:
        return f"{len(model.active_adapters)} adapters are active, and a request names one"
    config = model.peft_config[model.active_adapters[0]]
    if getattr(config.peft_type, "value", config.peft_type) != "LORA":
        return f"servers load LoRA adapters, this one is of type {config.peft_type}"
    # vLLM refuses some settings and ignores others without a word, such as ranks and scales per layer.
    used = [spec.name for spec in fields(config) if spec.name not in _PLAIN_LORA and _is_set(config, spec)]
    if config.bias != "none":
        used.append(f"bias={config.bias}")
    if config.init_lora_weights not in (True, False, "gaussian", "orthogonal", "eva"):
        used.append(f"init_lora_weights={config.init_lora_weights} (it changes the base model)")
    used += [f"target_modules={name}" for name in adapted_embeddings(model.get_base_model())]
    if used:
        return f"servers load plain LoRA adapters, this one uses {', '.join(used)}"
    return None


_PLAIN_LORA = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "ensure_weight_tying",
        "eva_config",
        "exclude_modules",
        "fan_in_fan_out",
        "inference_mode",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "megatron_core",
        "peft_type",
        "peft_version",
        "qalora_group_size",
        "r",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
"""Settings that servers honour, that are looked at by themselves, or that say nothing of the trained adapter."""


def _is_set(config: Any, spec: Any) -> bool:
    default = spec.default_factory() if spec.default_factory is not MISSING else spec.default
    value = getattr(config, spec.name)
    return bool(value) and value != default


class DiskWeightSync:
    """All weights, under the base model's names and with an adapter merged; the folder goes once they are loaded."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._checked = False

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        version = trainer.state.global_step
        with policy_weights(trainer) as (model, tensors), fail_together():
            if trainer.accelerator.is_main_process:
                if trainer.accelerator.device.type == "cpu":
                    tensors = with_tied_head(model, tensors)
                self._send(model, tensors, _version_folder(self._folder, version), rollout)
        rollout.share_policy_weights(version)

    def _send(self, model: Any, tensors: Mapping[str, torch.Tensor], path: Path, rollout: DualRollout) -> None:
        if not self._checked:
            check_visible(self._folder, rollout)
            self._checked = True
        try:
            with _writing(path):
                with _without_bars():
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
        model, version = unwrapped(trainer.model, trainer.accelerator), trainer.state.global_step
        tensors = trained_tensors(trainer)
        with fail_together():
            if trainer.accelerator.is_main_process:
                self._send(model, tensors, _version_folder(self._folder, version), rollout)
        rollout.use_policy_adapter()
        rollout.share_policy_weights(version)

    def _send(self, model: Any, tensors: Mapping[str, torch.Tensor], path: Path, rollout: DualRollout) -> None:
        name = model.active_adapters[0]
        # PEFT gives every adapter but the one named "default" a folder of its own.
        adapter = path if name == "default" else path / name
        with _writing(path):
            with _without_bars():
                model.save_pretrained(path, state_dict=tensors, selected_adapters=[name], save_embedding_layers=False)
            _readable(path)
            with safe_open(adapter / "adapter_model.safetensors", framework="pt") as written:
                if not written.keys():
                    raise WeightSyncError(f"{adapter} holds no tensors: the trainer's do not have PEFT's names")
        rollout.load_policy_adapter(str(adapter))
        if self._served is not None:
            shutil.rmtree(self._served, ignore_errors=True)
        self._served = path


class TrlWeightSync:
    """TRL sends the weights over NCCL, and resets the prefix cache, once for each step."""

    def sync(self, trainer: Any, rollout: DualRollout) -> None:
        if trainer.use_vllm and trainer.state.global_step != trainer._last_loaded_step:
            client = getattr(trainer.vllm_generation, "vllm_client", None)  # in the main process
            with fail_together():
                check_nccl_is_on(getattr(client, "communicator", None))
            try:
                trainer.vllm_generation.sync_weights()
            except Exception as error:
                raise WeightSyncError(
                    f"TRL's own weight transfer (use_vllm=True) failed: {type(error).__name__}: {error}. TRL 1.16 "
                    "takes vLLM 0.22 to 0.31, in the trainer's environment and as the server. With another version set "
                    "use_vllm=False, and dual_weight_sync sends the weights"
                ) from error
            trainer._last_loaded_step = trainer.state.global_step
        rollout.weight_version = trainer.state.global_step


def check_nccl_is_on(communicator: Any) -> None:
    """Refuse a transfer of TRL's that sends nothing.

    vLLM's communicator turns itself off, without a word, where vLLM cannot use the NCCL library that it finds. The
    server then loads memory that nobody has written, and every request of the transfer succeeds.

    Args:
        communicator: TRL's, a `PyNcclCommunicator` of vLLM's; None where there is none.

    Raises:
        WeightSyncError: it is off.
    """
    if getattr(communicator, "disabled", False):
        raise WeightSyncError(
            "TRL's weight transfer sends nothing: vLLM cannot use NCCL in the trainer's process, and π_θ's server "
            "would load whatever stands in its memory (if it has, start it again). Install vLLM with the PyTorch that "
            "it asks for, for trainer and server, or set VLLM_NCCL_SO_PATH for both to a newer libnccl.so.2: vLLM 0.32 "
            "needs NCCL 2.29.7, which `pip install 'nvidia-nccl-cu13>=2.29.7'` brings. VLLM_DISABLE_PYNCCL must not be "
            "set"
        )


def check_visible(folder: Path, rollout: DualRollout) -> None:
    """Refuse a folder that π_θ's server does not see, before a reload: a failed one may leave it without weights.

    Raises:
        EngineError: it does not see the folder.
    """
    probe = _version_folder(folder, "probe")
    try:
        with _writing(probe):
            probe.mkdir(parents=True)
            save_file({}, probe / "model.safetensors")
            _readable(probe)
        rollout.check_policy_server_sees(str(probe))
    finally:
        shutil.rmtree(probe, ignore_errors=True)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What is written to `path` is whole, or gone.

    Raises:
        WeightSyncError: it could not be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(path, ignore_errors=True)
        where = path.parent if path.parent.exists() else path.parent.parent
        free = f", {shutil.disk_usage(where).free / 2**30:.1f} GiB are free there" if where.exists() else ""
        raise WeightSyncError(
            f"the policy's weights cannot be written to {path}: {error}{free}. Make room (a sync needs as much as a "
            "checkpoint of the model without its optimizer), or set dual_weight_sync_dir to another folder"
        ) from error


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """transformers shows a bar for every file that it writes, and weights are sent at every step."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _readable(folder: Path) -> None:
    """Let whom the folder is open to read its files too: safetensors keeps them to the trainer's user."""
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(folder.stat().st_mode & 0o666)


def _version_folder(folder: Path, version: int | str) -> Path:
    """A path that no earlier version, run or attempt has had."""
    return folder.resolve() / f"step-{version}-{secrets.token_hex(4)}"
