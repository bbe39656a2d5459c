"""LoRA adapters on the embedded server's model, by PEFT's own functions.

transformers' own methods for it (`model.load_adapter`, `set_adapter`, ...) refuse a PEFT older than the one it names,
whatever they need of it: 5.24 names 0.22, while the newest PEFT was 0.21.2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

_MODEL_IN_FILES = "base_model.model."
"""What PEFT puts before each tensor's name in a file."""


class Adapters:
    """Those that `model` has, of which one is in use, or none. PEFT is imported with the first of them.

    Args:
        model: gets PEFT's layers with the first adapter, and keeps them.
    """

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._used: str | None = None

    def load(self, name: str, folder: str) -> None:
        """Add the adapter that PEFT saved in `folder`; it is not in use yet.

        Raises:
            FileNotFoundError: the folder holds none.
            ValueError, RuntimeError, OSError: it does not fit the model, or is none that vLLM would load; the model
                is as before.
        """
        try:
            from peft import PeftConfig
            from peft.functional import inject_adapter_in_model, set_peft_model_state_dict
        except ModuleNotFoundError as error:
            raise ValueError("adapters need PEFT beside the server: pip install 'dual_rollout[server]'") from error
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not Path(folder, file).is_file():
                raise FileNotFoundError(f"No adapter found for {folder}: there is no {file} in it")
        config = PeftConfig.from_pretrained(folder)
        _check_plain_lora(config, folder)
        tensors = _read(Path(folder, "adapter_model.safetensors"))
        try:
            inject_adapter_in_model(config, self._model, name)
            result: Any = set_peft_model_state_dict(self._model, tensors, name)
            missing = [key for key in result.missing_keys if name in key.split(".")]
            if missing or result.unexpected_keys:
                raise ValueError(
                    f"the tensors in {folder} are not those of its adapter_config.json on this model: "
                    f"missing {missing[:3]}, unexpected {result.unexpected_keys[:3]}"
                )
        except Exception:
            self.unload(name)
            raise
        self._model.eval()
        self._switch_to(None)

    def unload(self, name: str) -> None:
        """Remove an adapter; the model without any is in use then."""
        from peft.functional import delete_adapter

        delete_adapter(self._model, name, prefix="lora_")
        getattr(self._model, "peft_config", {}).pop(name, None)
        self._switch_to(None)

    def use(self, name: str | None) -> None:
        """Compute with this adapter from now on, or with none."""
        if name != self._used:
            self._switch_to(name)

    def _switch_to(self, name: str | None) -> None:
        from peft.functional import set_adapter
        from peft.tuners.tuners_utils import BaseTunerLayer

        if name is not None:
            set_adapter(self._model, name)
        for layer in self._model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.enable_adapters(name is not None)
        self._model.requires_grad_(False)  # PEFT's functions ask for the adapter's gradients
        self._used = name


def _check_plain_lora(config: Any, folder: str) -> None:
    """ValueError for adapters that vLLM refuses too."""
    if config.peft_type != "LORA":
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"{folder} holds an adapter of type {kind}; only LoRA adapters can be loaded")
    if config.modules_to_save:
        raise ValueError(f"{folder} holds whole modules ({config.modules_to_save}) beside its LoRA adapter")


def _read(file: Path) -> dict[str, Any]:
    try:
        return {name.removeprefix(_MODEL_IN_FILES): tensor for name, tensor in load_file(file).items()}
    except SafetensorError as error:
        raise OSError(f"{file} is a broken safetensors file: {error}") from error
