"""After a training step π_θ's server answers with the trainer's weights, and π_t's with its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from dual_rollout import DualRollout
from dual_rollout.exceptions import EngineError, WeightSyncError
from dual_rollout.training.connections import ADAPTER_NAME
from dual_rollout.training.policy_state_dict import merged, plain_tensors
from dual_rollout.training.weight_sync import (
    DiskWeightSync,
    LoraWeightSync,
    TrlWeightSync,
    choose_weight_sync,
    weight_folder,
    why_not_lora,
)
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, count_of_the, dual_config, grpo_config
from tests.synced_training import (
    Synced,
    distance,
    largest_error,
    lora_config,
    post,
    served,
    served_models,
    train,
)
from tests.warm_servers import WarmServer


@pytest.fixture
def lora_pair(tiny_models: tuple[Path, Path]) -> Iterator[TinyPair]:
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
    with (
        WarmServer(tiny_models[0], [*flags, "--enable-lora"]) as theta,
        WarmServer(tiny_models[1], flags) as t,
    ):
        yield TinyPair(*tiny_models, theta.url, t.url)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "merged adapter"])
def test_full_weights_reach_the_server(tiny_pair: TinyPair, tmp_path: Path, peft: bool) -> None:
    before = served(tiny_pair.theta_url), served(tiny_pair.t_url)
    left_by_a_killed_run = weight_folder(tmp_path, tmp_path / "shared") / "step-7-abc"
    left_by_another_run = weight_folder(tmp_path / "another", tmp_path / "shared") / "step-7-abc"
    for folder in (left_by_a_killed_run, left_by_another_run):
        folder.mkdir(parents=True)
    trainer = train(tiny_pair, tmp_path, lora_config() if peft else None, weight_sync_dir=tmp_path / "shared")
    assert max(trainer.errors) < 1e-3
    assert served_models(tiny_pair.theta_url) == [str(tiny_pair.theta_model)]
    after = served(tiny_pair.theta_url), served(tiny_pair.t_url)
    assert distance(after[0], before[0]) > 0.05
    assert distance(after[1], before[1]) < 1e-4
    # The last sync was before the last step: the server has that step's weights, not the final ones.
    assert largest_error(after[0], trainer.model.eval()) > 0.05
    assert trainer.versions == [[0] * 4, [1] * 4, [2] * 4]
    assert list(left_by_a_killed_run.parent.iterdir()) == [] and left_by_another_run.exists()
    assert all(log["perf/weight_sync_s"] > 0 for log in trainer.state.log_history if "loss" in log)


def test_an_adapter_alone_reaches_the_server(lora_pair: TinyPair, tmp_path: Path) -> None:
    before = served(lora_pair.theta_url), served(lora_pair.t_url)
    trainer = train(lora_pair, tmp_path, lora_config())
    assert max(trainer.errors) < 1e-3
    assert distance(served(lora_pair.theta_url), before[0]) < 1e-4, "the base model stays"
    assert distance(served(lora_pair.t_url), before[1]) < 1e-4
    after = served(lora_pair.theta_url, ADAPTER_NAME)
    assert distance(after, before[0]) > 0.05
    assert largest_error(after, trainer.model.eval()) > 0.05
    assert trainer.versions == [[0] * 4, [1] * 4, [2] * 4]
    (version,) = (tmp_path / "theta_weights").iterdir()
    assert version.name.startswith("step-2-") and not (version / "model.safetensors").exists()
    assert ADAPTER_NAME not in served_models(lora_pair.t_url)


def test_only_the_policy_forgets_its_prefixes(tiny_pair: TinyPair, tmp_path: Path) -> None:
    def cached(url: str) -> int:
        body = {"model": served_models(url)[0], "prompt": [list(range(40, 104))], "max_tokens": 1}
        return post(url, "/v1/completions", body)["usage"]["prompt_tokens_details"]["cached_tokens"]

    for url in (tiny_pair.theta_url, tiny_pair.t_url):
        cached(url)
        assert cached(url) > 0
    trainer = Synced(
        model=str(tiny_pair.theta_model),
        reward_funcs=count_of_the,
        args=grpo_config(tmp_path),
        train_dataset=chat_dataset(),
        dual_config=dual_config(tiny_pair),
    )
    with trainer.rollout:
        trainer._weight_sync.sync(trainer, trainer.rollout)
    assert cached(tiny_pair.theta_url) == 0 and cached(tiny_pair.t_url) > 0


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens"]}, {"use_dora": True}])
def test_merging_gives_the_same_distribution_and_leaves_the_model_as_it_was(
    tiny_models: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_models[0]), lora_config(**options)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    ids = torch.tensor([list(range(40, 60))])
    with torch.no_grad():
        expected = model(ids).logits
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with merged(model) as base:
        base.save_pretrained(tmp_path, state_dict=plain_tensors(base))
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_folder_the_server_does_not_see_is_refused_before_a_reload(tiny_pair: TinyPair, tmp_path: Path) -> None:
    before = served(tiny_pair.theta_url)
    with DualRollout(dual_config(tiny_pair)) as rollout, pytest.raises(EngineError, match="dual_weight_sync_dir"):
        rollout.check_policy_server_sees(str(tmp_path / "on another machine"))
    assert distance(served(tiny_pair.theta_url), before) < 1e-4


def test_an_adapter_the_server_does_not_see_is_refused(lora_pair: TinyPair, tmp_path: Path) -> None:
    with DualRollout(dual_config(lora_pair)) as rollout, pytest.raises(EngineError, match="dual_weight_sync_dir"):
        rollout.load_policy_adapter(str(tmp_path / "on another machine"))


class Stand:
    """What `choose_weight_sync` looks at of a trainer."""

    use_vllm = False

    def __init__(self, model: Any):
        self.accelerator = Accelerator(cpu=True)
        self.model = model


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"init_lora_weights": "olora"}, "init_lora_weights=olora"),
    ],
)
def test_what_servers_cannot_load_goes_as_full_weights(
    lora_pair: TinyPair, tmp_path: Path, options: dict[str, Any], reason: str
) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(lora_pair.theta_model), lora_config(**options))
    assert reason in str(why_not_lora(model))
    with DualRollout(dual_config(lora_pair)) as rollout:
        assert isinstance(choose_weight_sync(Stand(model), rollout, "auto", tmp_path), DiskWeightSync)
        with pytest.raises(ValueError, match=reason.split("=")[0]):
            choose_weight_sync(Stand(model), rollout, "lora", tmp_path)


def test_the_way_is_chosen_by_model_and_server(tiny_pair: TinyPair, lora_pair: TinyPair, tmp_path: Path) -> None:
    full = AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model)
    adapter = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model), lora_config())

    def chosen(pair: TinyPair, model: Any, method: Any) -> type:
        with DualRollout(dual_config(pair)) as rollout:
            return type(choose_weight_sync(Stand(model), rollout, method, tmp_path))

    assert chosen(lora_pair, full, "auto") is DiskWeightSync
    assert chosen(lora_pair, adapter, "auto") is LoraWeightSync
    assert chosen(tiny_pair, adapter, "auto") is DiskWeightSync, "this server loads no adapters"
    assert chosen(lora_pair, adapter, "disk") is DiskWeightSync
    with pytest.raises(ValueError, match="peft_config"):
        chosen(lora_pair, full, "lora")
    with pytest.raises(ValueError, match="dual_weight_sync"):
        chosen(lora_pair, full, "nccl")
    nccl = Stand(adapter)
    nccl.use_vllm = True
    with DualRollout(dual_config(tiny_pair)) as rollout:
        sync = choose_weight_sync(nccl, rollout, "auto", tmp_path)
    assert type(sync) is TrlWeightSync


def test_a_transfer_of_trls_own_that_fails_or_sends_nothing_says_why(tiny_pair: TinyPair) -> None:
    """It is asked for again by the next rollout, whose tokens would else be recorded under weights that never came."""

    def refused() -> None:
        raise RuntimeError("404 /update_weights")

    generation = SimpleNamespace(sync_weights=refused)
    trainer = SimpleNamespace(
        use_vllm=True, state=SimpleNamespace(global_step=3), _last_loaded_step=2, vllm_generation=generation
    )
    with DualRollout(dual_config(tiny_pair)) as rollout:
        with pytest.raises(WeightSyncError, match=r"404 /update_weights.*vLLM 0\.22 to 0\.31.*use_vllm=False"):
            TrlWeightSync().sync(trainer, rollout)
        assert trainer._last_loaded_step == 2 and rollout.weight_version is None
        generation.sync_weights = lambda: None
        generation.vllm_client = SimpleNamespace(communicator=SimpleNamespace(disabled=True))  # vLLM without NCCL
        with pytest.raises(WeightSyncError, match=r"sends nothing.*VLLM_NCCL_SO_PATH"):
            TrlWeightSync().sync(trainer, rollout)
        assert trainer._last_loaded_step == 2 and rollout.weight_version is None
        generation.vllm_client.communicator.disabled = False
        TrlWeightSync().sync(trainer, rollout)
        assert trainer._last_loaded_step == rollout.weight_version == 3
