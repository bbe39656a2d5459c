"""Short GRPO runs on real vLLM: after each sync π_θ's server answers with the trainer's weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dual_rollout import DualRollout
from dual_rollout.exceptions import EngineError
from dual_rollout.training.connections import ADAPTER_NAME
from tests.integration.conftest import TinyPair
from tests.integration.test_training import dual_config
from tests.synced_training import distance, largest_error, lora_config, served, served_models, train
from tests.vllm.conftest import ServerPair


@pytest.fixture
def pair(vllm_pair: ServerPair) -> Iterator[TinyPair]:
    """The session's servers; π_θ's gets its own weights back."""
    pair = TinyPair(vllm_pair.theta.model, vllm_pair.t.model, vllm_pair.theta.url, vllm_pair.t.url)
    yield pair
    with DualRollout(dual_config(pair)) as rollout:
        rollout.reload_policy_weights(str(pair.theta_model))


@pytest.mark.parametrize("peft", [False, True], ids=["full", "merged adapter"])
def test_full_weights_reach_the_server(pair: TinyPair, tmp_path: Path, peft: bool) -> None:
    before = served(pair.theta_url), served(pair.t_url)
    trainer = train(pair, tmp_path, lora_config() if peft else None)
    assert len(trainer.errors) == 3 and max(trainer.errors) < 1e-3
    assert served_models(pair.theta_url) == ["tiny"], "this server loads no adapters: the merged model was sent"
    after = served(pair.theta_url), served(pair.t_url)
    assert distance(after[0], before[0]) > 0.05
    assert distance(after[1], before[1]) < 1e-4
    assert trainer.versions == [[0] * 4, [1] * 4, [2] * 4]


def test_an_adapter_alone_reaches_the_server(pair: TinyPair, lora_url: str, tmp_path: Path) -> None:
    pair = TinyPair(pair.theta_model, pair.t_model, lora_url, pair.t_url)
    before = served(lora_url), served(pair.t_url)
    trainer = train(pair, tmp_path, lora_config())
    assert len(trainer.errors) == 3 and max(trainer.errors) < 1e-3
    assert distance(served(lora_url), before[0]) < 1e-4, "the base model stays"
    after = served(lora_url, ADAPTER_NAME)
    assert distance(after, before[0]) > 0.05
    assert largest_error(after, trainer.model.eval()) > 0.05, "the last step came after the last sync"
    assert distance(served(pair.t_url), before[1]) < 1e-4
    assert trainer.versions == [[0] * 4, [1] * 4, [2] * 4]
    # Loaded with load_inplace, vLLM would read the adapter again at each step, and die of this:
    shutil.rmtree(tmp_path / "theta_weights")
    assert distance(served(lora_url, ADAPTER_NAME), after) < 1e-4


def test_a_folder_the_server_does_not_see_is_refused_and_harms_nothing(pair: TinyPair, tmp_path: Path) -> None:
    before = served(pair.theta_url)
    with DualRollout(dual_config(pair)) as rollout:
        with pytest.raises(EngineError, match="dual_weight_sync_dir"):
            rollout.check_policy_server_sees(str(tmp_path / "on another machine"))
        assert distance(served(pair.theta_url), before) < 1e-4
        # Nor does the same question about a folder that it sees.
        save_file({}, tmp_path / "model.safetensors")
        rollout.check_policy_server_sees(str(tmp_path))
    assert distance(served(pair.theta_url), before) < 1e-4


def test_a_server_is_asked_whether_it_loads_adapters(pair: TinyPair, lora_url: str, tmp_path: Path) -> None:
    with DualRollout(dual_config(pair)) as rollout:
        assert not rollout.policy_server_loads_lora(), "started without --enable-lora"
    with DualRollout(dual_config(TinyPair(pair.theta_model, pair.t_model, lora_url, pair.t_url))) as rollout:
        assert rollout.policy_server_loads_lora()
        with pytest.raises(EngineError, match="dual_weight_sync_dir"):
            rollout.load_policy_adapter(str(tmp_path / "on another machine"))
    assert served(lora_url)
