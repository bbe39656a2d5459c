"""TRL's own `AsyncGRPOTrainer` on a CPU: a run whose weights do not reach π_θ's server stops at that transfer.

TRL's transfer needs two GPUs and its attention a kernel for them. Here weights go through a folder, and PyTorch does
the sums of that kernel; the rest of the trainer is TRL's.
"""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import trl.experimental.async_grpo.packing as packing
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoTokenizer
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer, async_rollout_worker
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

from dual_rollout import CoordinatorConfig, DualRollout
from dual_rollout.exceptions import WeightSyncError
from dual_rollout.training.async_grpo import DualRolloutWorker
from dual_rollout.training.async_policy_check import AsyncPolicyCheck
from tests.integration.conftest import TinyPair
from tests.integration.test_training import count_of_the, dual_config
from tests.synced_training import lora_config


def attention(q: Any, k: Any, v: Any, ends_q: Any, ends_k: Any, *_: Any, softmax_scale: float, **__: Any) -> Any:
    """What FlashAttention's ragged causal kernel returns: query i of n sees all keys but the last n − 1 − i."""
    outputs = []
    for q0, q1, k0, k1 in zip(ends_q, ends_q[1:], ends_k, ends_k[1:], strict=False):
        n, m = int(q1 - q0), int(k1 - k0)
        seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
        query, key, value = (x.transpose(0, 1)[None] for x in (q[q0:q1], k[k0:k1], v[k0:k1]))
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=softmax_scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class Worker:
    """Rollouts without a model, as many as are asked for."""

    def __init__(self) -> None:
        self.rollout_buffer: queue.Queue[RolloutSample] = queue.Queue()
        self.metrics_queue: queue.Queue[Any] = queue.Queue()
        self.started = False

    def start(self) -> None:
        self.started = True
        random = np.random.default_rng(0)
        for i in range(64):
            mask = np.array([0, 0, 1, 1, 1, 1])
            self.rollout_buffer.put(
                RolloutSample(
                    prompt=[],
                    completion=[],
                    input_ids=random.integers(3, 256, 6),
                    completion_mask=mask,
                    old_log_probs=-2.0 * mask.astype(np.float32),
                    advantage=(-1.0) ** i,
                    model_version=1,
                    group_id=i // 2,
                    metrics={"reward": 0.0},
                )
            )

    def stop(self) -> None: ...

    def update_model_version(self, model_version: int) -> None: ...

    def check_health(self, stale_after_s: float) -> None: ...


class FolderTransfer:
    """Sends the weights through a folder.

    Args:
        send: what of a tensor arrives in the given transfer, counted from 1.
    """

    def __init__(self, rollout: DualRollout, folder: Path, send: Callable[[torch.Tensor, int], torch.Tensor]):
        self._rollout, self._folder, self._send, self.number = rollout, folder, send, 0
        self.model_update_group: Any = None

    def init_weight_transfer(self) -> None: ...

    def pause(self) -> None: ...

    def send_weights(self, iterator: Iterator[tuple[str, torch.Tensor]]) -> None:
        self.number += 1
        self._folder.mkdir(exist_ok=True)
        weights = {name: self._send(tensor, self.number).contiguous() for name, tensor in iterator}
        save_file(weights, self._folder / "model.safetensors")
        self._rollout.reload_policy_weights(str(self._folder))

    def resume(self) -> None: ...

    def destroy(self) -> None: ...


@pytest.fixture
def make(tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")  # for figures of its speed
    config = dual_config(tiny_pair)
    with DualRollout(config) as rollout:

        def make(send: Callable[[torch.Tensor, int], torch.Tensor], peft_config: Any = None, **options: Any) -> Any:
            args = AsyncGRPOConfig(
                output_dir=str(tmp_path / "run"),
                vllm_server_base_url=tiny_pair.theta_url,
                max_steps=2,
                learning_rate=1e-2,
                token_budget=48,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                **options,
            )
            trainer = AsyncGRPOTrainer(
                str(tiny_pair.theta_model),
                args=args,
                train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "what"}]}]),
                processing_class=AutoTokenizer.from_pretrained(tiny_pair.theta_model),
                peft_config=peft_config,
                rollout_worker=cast(Any, Worker()),
                weight_transfer=FolderTransfer(rollout, tmp_path / "weights", send),
            )
            trainer.add_callback(AsyncPolicyCheck(trainer, config))
            return trainer

        yield make
        rollout.reload_policy_weights(str(tiny_pair.theta_model))


@pytest.mark.parametrize("peft_config", [None, lora_config()], ids=["full", "merged adapter"])
def test_every_transfer_is_compared(make: Callable[..., Any], peft_config: Any) -> None:
    trainer = make(lambda tensor, number: tensor, peft_config)
    attention_before = trainer.model.config._attn_implementation
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and trainer.weight_transfer.number == 3
    assert all(log["sampling/policy_check"] < 1e-4 and log["perf/policy_check_s"] > 0 for log in logs)
    assert trainer.model.config._attn_implementation == attention_before


def test_weights_that_never_arrive_stop_the_run_before_its_first_step(make: Callable[..., Any]) -> None:
    """As memory that nobody has written: the server then gives every token the same probability."""
    trainer = make(lambda tensor, number: torch.zeros_like(tensor))
    with pytest.raises(WeightSyncError, match=r"policy after TRL's first transfer: .* differs by .*did not arrive"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_later_transfer_that_arrives_in_part_stops_the_run(make: Callable[..., Any]) -> None:
    def but_matrices(tensor: torch.Tensor, number: int) -> torch.Tensor:
        if number == 1:
            sent.append(tensor.clone())
            return tensor
        return sent.pop(0) if tensor.ndim == 2 else (sent.pop(0), tensor)[1]

    sent: list[torch.Tensor] = []
    trainer = make(but_matrices)
    with pytest.raises(WeightSyncError, match=r"policy after TRL's transfer in step 1:"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_steps_without_a_transfer_are_not_compared(make: Callable[..., Any]) -> None:
    trainer = make(lambda tensor, number: tensor, weight_sync_steps=2)
    trainer.train()
    compared = ["sampling/policy_check" in log for log in trainer.state.log_history if "loss" in log]
    assert trainer.weight_transfer.number == 2 and compared == [True, True]  # the first log has the beginning's


def test_nccl_that_vllm_cannot_use_is_named(make: Callable[..., Any]) -> None:
    trainer = make(lambda tensor, number: tensor)
    trainer.weight_transfer.model_update_group = SimpleNamespace(disabled=True)  # vLLM's communicator without a library
    with pytest.raises(WeightSyncError, match=r"sends nothing: vLLM cannot use NCCL.*VLLM_NCCL_SO_PATH"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_it_cannot_compare_is_refused(make: Callable[..., Any]) -> None:
    trainer, config = make(lambda tensor, number: tensor), CoordinatorConfig()
    with pytest.raises(ValueError, match="bound must be above 0, got 0"):
        AsyncPolicyCheck(trainer, config, bound=0.0)
    trainer._lora_sync = True  # TRL's answer to a server with --enable-lora
    with pytest.raises(ValueError, match="without --enable-lora"):
        AsyncPolicyCheck(trainer, config)


def test_a_worker_says_that_nobody_compares(
    make: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(async_rollout_worker, "is_vllm_available", lambda: True)
    monkeypatch.setattr(async_rollout_worker.AsyncRolloutWorker, "start", lambda self: None)  # its process needs vLLM
    trainer, config = make(lambda tensor, number: tensor), CoordinatorConfig()
    trainer.rollout_worker = DualRolloutWorker(dual_config=config, reward_funcs=[count_of_the])
    with caplog.at_level(logging.WARNING, logger="dual_rollout"):
        trainer.rollout_worker.start()
        assert "add_callback(AsyncPolicyCheck(trainer, dual_config))" in caplog.text
        caplog.clear()
        AsyncPolicyCheck(trainer, config)
        trainer.rollout_worker.start()
        assert not caplog.messages
