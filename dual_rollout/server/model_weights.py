"""Replace the weights of a running model by those of a folder, all of them or none."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel


def read_weights(model: PreTrainedModel, folder: str, *, partial: bool = False) -> dict[str, torch.Tensor]:
    """The tensors of ``model.safetensors`` (or of a sharded index) in ``folder``, one per parameter.

    ``partial`` allows some parameters, or all, to have none.

    Raises ValueError when names or shapes do not fit the model, OSError when files are missing or broken;
    the model is not touched.
    """
    files = _weight_files(Path(folder))
    tensors: dict[str, torch.Tensor] = {}
    try:
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  (not a mapping)
                    tensors[name] = opened.get_tensor(name)
    except SafetensorError as error:
        raise OSError(f"{folder} holds a broken safetensors file: {error}") from error
    return _fit(model, tensors, folder, partial)


def write_weights(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    """Copy what ``read_weights`` returned into the model's parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        names = _names(index)
        if outside := [name for name in names if Path(name).name != name]:
            raise ValueError(f"{index} names files outside its folder: {', '.join(outside[:5])}")
        return [folder / name for name in names]
    raise FileNotFoundError(
        f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
        "weights_path must be a folder written by save_pretrained"
    )


def _names(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is not an index of safetensors files: {error}") from error


def _fit(
    model: PreTrainedModel, tensors: dict[str, torch.Tensor], folder: str, partial: bool
) -> dict[str, torch.Tensor]:
    """Match tensors to parameters by name and shape, looking through LoRA's ``base_layer``."""
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name.replace(".base_layer.", "."))
    weights: dict[str, torch.Tensor] = {}
    known: set[str] = set()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        known.update(aliases[id(parameter)])
        found = next((alias for alias in aliases[id(parameter)] if alias in tensors), None)
        if found is None and partial:
            continue
        if found is None:
            raise ValueError(f"{folder} has no tensor for {aliases[id(parameter)][0]}: not weights of this model")
        if tensors[found].shape != parameter.shape:
            raise ValueError(
                f"{found} has shape {tuple(tensors[found].shape)} in {folder} "
                f"but {tuple(parameter.shape)} in the served model"
            )
        weights[name] = tensors[found]
    if unknown := sorted(name for name in tensors if name not in known and "rotary_emb" not in name):
        raise ValueError(f"{folder} has tensors the served model does not have: {', '.join(unknown[:5])}")
    return weights
