"""The trainer on a GPU; the servers are embedded ones on the CPU, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dual_rollout.training.correction import corrected_weights
from tests.integration.conftest import TinyPair
from tests.integration.test_training import Recording, chat_dataset, count_of_the, dual_config, grpo_config
from tests.synced_training import largest_error, lora_config, served

# In one process TRL splits a model over all GPUs that it sees.
pytestmark = pytest.mark.skipif(torch.cuda.device_count() > 1, reason="needs CUDA_VISIBLE_DEVICES=0")


def train(pair: TinyPair, folder: Path, *, peft: bool = False, **options: Any) -> Recording:
    trainer = Recording(
        model=str(pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(folder, use_cpu=False, **options),
        train_dataset=chat_dataset(),
        dual_config=dual_config(pair),
        peft_config=lora_config() if peft else None,
        weight_sync="disk",
    )
    with trainer.rollout:
        trainer.train()
    return trainer


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"num_iterations": 2}, {"peft": True}])
def test_weights_and_drift(tiny_pair: TinyPair, tmp_path: Path, options: dict[str, Any]) -> None:
    """In float32 the trainer's π_θ is the server's, so the weights are those of the servers' log-probabilities."""
    trainer = train(tiny_pair, tmp_path, max_steps=3, **options)
    assert next(trainer.model.parameters()).is_cuda
    for batch in trainer.batches:
        assert batch["advantages"].is_cuda and batch["importance_sampling_ratio"].is_cuda
        log_weights = batch["logprobs_theta"] - batch["sampling_per_token_logps"]
        expected = corrected_weights(log_weights, batch["completion_mask"], "token_truncate")
        torch.testing.assert_close(batch["importance_sampling_ratio"], expected, atol=5e-3, rtol=5e-3)
    drift = [entry["sampling/policy_drift/max"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(drift) >= 2
    assert max(drift) < 5e-3


def test_bfloat16_trains_with_a_small_drift(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """The server's weights are those of the trainer's float32 master copy; only the autocast differs."""
    trainer = train(tiny_pair, tmp_path, bf16=True)
    drift = [entry["sampling/policy_drift/mean"] for entry in trainer.state.log_history if "reward" in entry]
    assert max(drift) < 0.1
    assert all(torch.isfinite(parameter).all() for parameter in trainer.model.parameters())


def test_the_server_has_the_trainers_weights(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = train(tiny_pair, tmp_path)
    trainer._weight_sync.sync(trainer, trainer.rollout)
    trainer.rollout.close()
    assert largest_error(served(tiny_pair.theta_url), trainer.model.cpu()) < 1e-3
