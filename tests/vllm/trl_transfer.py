"""TRL's own weight transfer (`use_vllm=True`) with a file in the place of NCCL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from trl.generation import vllm_client, vllm_generation


def send_by_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[set[str]]:
    """The names that each transfer has sent, which are TRL's; vLLM hands the tensors to `load_weights` by the same way.

    The trainer's environment needs no vLLM then, which TRL imports for NCCL only.
    """
    sent: list[set[str]] = []

    def by_file(client: Any, metadata: Any, named_params: Any) -> None:
        path = folder / f"sync{len(sent)}"
        path.mkdir()
        tensors = {name: tensor.detach().clone().contiguous() for name, tensor in named_params}
        assert [name for name, *_ in metadata] == list(tensors)
        save_file(tensors, path / "model.safetensors")
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        client._post(f"{client.base_url}/collective_rpc", json=body)
        sent.append(set(tensors))

    for module in (vllm_client, vllm_generation):
        monkeypatch.setattr(module, "is_vllm_available", lambda *_, **__: True)
    monkeypatch.setattr(vllm_client.VLLMClient, "init_communicator", lambda *_, **__: None)
    monkeypatch.setattr(vllm_client.VLLMClient, "update_named_params", by_file)
    return sent
