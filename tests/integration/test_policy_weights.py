"""What π_θ's server serves after a sync is the trainer's model, whatever wraps it there; or the trainer refuses it."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerState

from dual_rollout import DualGRPOTrainer, DualRollout
from dual_rollout.exceptions import WeightSyncError
from dual_rollout.training.connections import ADAPTER_NAME
from dual_rollout.training.weight_sync import DiskWeightSync, LoraWeightSync
from tests.integration.conftest import TinyPair
from tests.integration.test_training import chat_dataset, count_of_the, dual_config, grpo_config
from tests.synced_training import Synced, distance, largest_error, served
from tests.warm_servers import WarmServer

LAYERS = ["q_proj", "down_proj"]
ROUNDING = 2e-4  # nats, in float32


class Trainer:
    """What a weight sync looks at of a trainer."""

    use_vllm = False

    def __init__(self, model: Any, *, compiled: bool = False):
        self.accelerator = Accelerator(cpu=True)
        self.state = TrainerState()
        self.model = model
        self.model_wrapped = torch.compile(model, backend="eager") if compiled else model


@pytest.fixture(scope="module")
def lora_server(tiny_models: tuple[Path, Path]) -> Iterator[str]:
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1", "--enable-lora"]
    with WarmServer(tiny_models[0], flags) as server:
        yield server.url


@pytest.fixture(scope="module")
def tied_model(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny policy with one tensor for both embeddings."""
    folder = tmp_path_factory.mktemp("tied")
    shutil.copytree(tiny_models[0], folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_models[0])
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.get_input_embeddings().weight
    with torch.no_grad():
        model.lm_head.weight.mul_(0.2)
    model.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return folder


def adapted(folder: Path, config: PeftConfig, *, ref: bool = False) -> Any:
    """The model with a trained adapter: all that is trained is moved, so that each part of it matters."""
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    if ref:  # as TRL does for a PeftModel and beta > 0
        model.add_adapter("ref", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and ".ref" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval()


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": LAYERS, **options})


def other(kind: str, **options: Any) -> PeftConfig:
    return getattr(peft, f"{kind}Config")(**{"task_type": "CAUSAL_LM", "target_modules": LAYERS, **options})


MERGED = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "rslora with patterns": lora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 3}),
    "lora on the output": lora(target_modules=["q_proj", "lm_head"]),
    "lora on the embeddings": lora(target_modules=["q_proj", "embed_tokens"]),
    "lora with another init": lora(init_lora_weights="pissa"),
    "lora on a parameter": lora(target_modules=[], target_parameters=["q_proj.weight"]),
    "modules_to_save": lora(modules_to_save=["lm_head", "embed_tokens"]),
    "trained tokens": lora(trainable_token_indices=[20, 30]),
    "trained tokens in both": lora(trainable_token_indices={"embed_tokens": [20, 30], "lm_head": [20, 30]}),
    "trained tokens alone": other("TrainableTokens", target_modules=["embed_tokens"], token_indices=[20, 30]),
    "ia3": other("IA3", feedforward_modules=["down_proj"]),
    "oft": other("OFT", oft_block_size=8, r=0),
    "boft": other("BOFT", boft_block_size=8),
    "hra": other("HRA"),
    "loha": other("LoHa"),
    "lokr": other("LoKr"),
    "vera": other("Vera"),
    "adalora": other("AdaLora", total_step=10),
    "fourierft": other("FourierFT", n_frequency=50),
    "randlora": other("RandLora"),
    "layer norms": other("LNTuning", target_modules=["input_layernorm", "norm"]),
}


@pytest.mark.parametrize(
    ("kind", "compiled"), [*((kind, False) for kind in MERGED), ("lora", True), ("modules_to_save", True)]
)
def test_a_merged_adapter_of_any_kind_is_served(tiny_pair: TinyPair, tmp_path: Path, kind: str, compiled: bool) -> None:
    model = adapted(tiny_pair.theta_model, MERGED[kind], ref=kind == "modules_to_save")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with DualRollout(dual_config(tiny_pair)) as rollout:
        DiskWeightSync(tmp_path).sync(Trainer(model, compiled=compiled), rollout)
    base = AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model).eval()
    rows = served(tiny_pair.theta_url)
    assert largest_error(rows, base) > 100 * ROUNDING, "the adapter does something"
    assert largest_error(rows, model) < ROUNDING
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "the trainer goes on where it was"


def test_all_weights_of_a_compiled_model_are_served(tiny_pair: TinyPair, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.t_model).eval()
    with DualRollout(dual_config(tiny_pair)) as rollout:
        DiskWeightSync(tmp_path).sync(Trainer(model, compiled=True), rollout)
    assert largest_error(served(tiny_pair.theta_url), model) < ROUNDING


@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 3}])
def test_an_adapter_alone_is_served(
    tiny_pair: TinyPair, lora_server: str, tmp_path: Path, options: dict[str, Any], compiled: bool
) -> None:
    model = adapted(tiny_pair.theta_model, lora(**options))
    with DualRollout(replace(dual_config(tiny_pair), theta_url=lora_server)) as rollout:
        LoraWeightSync(tmp_path).sync(Trainer(model, compiled=compiled), rollout)
    rows = served(lora_server, ADAPTER_NAME)
    assert largest_error(rows, AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model).eval()) > 100 * ROUNDING
    assert largest_error(rows, model) < ROUNDING


@pytest.mark.parametrize(
    "config",
    [
        lora(),
        lora(trainable_token_indices=[20, 30]),
        lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ],
    ids=["lora", "trained tokens", "modules_to_save, tied too"],
)
def test_tied_embeddings_are_served(tied_model: Path, tiny_pair: TinyPair, tmp_path: Path, config: PeftConfig) -> None:
    model = adapted(tied_model, config)
    flags = ["--max-logprobs", "-1", "--max-model-len", "256", "--threads", "1"]
    with (
        WarmServer(tied_model, flags) as server,
        DualRollout(replace(dual_config(tiny_pair), theta_url=server.url)) as rollout,
    ):
        DiskWeightSync(tmp_path).sync(Trainer(model), rollout)
        assert largest_error(served(server.url), model) < ROUNDING


REFUSED = {
    "one of two tied embeddings": (True, lora(target_modules=["q_proj", "embed_tokens"]), "tie_word_embeddings"),
    "a copy of a tied one": (True, lora(modules_to_save=["lm_head"]), "tie_word_embeddings"),
    "a prompt": (False, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual tokens"),
    "a prefix": (False, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual tokens"),
    "an encoded prompt": (False, peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "virtual"),
    "after an invocation": (False, lora(alora_invocation_tokens=[7]), "cannot merge"),
    "a new bias": (False, lora(lora_bias=True), "cannot merge"),
    "no merge in PEFT": (False, other("Lily"), "cannot merge"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_no_plain_model_can_be_is_refused_by_the_constructor(
    tied_model: Path, tiny_pair: TinyPair, tmp_path: Path, kind: str
) -> None:
    tied, config, reason = REFUSED[kind]
    with pytest.raises(ValueError, match=reason):
        DualGRPOTrainer(
            model=str(tied_model if tied else tiny_pair.theta_model),
            reward_funcs=count_of_the,
            args=grpo_config(tmp_path),
            train_dataset=chat_dataset(),
            dual_config=dual_config(tiny_pair),
            peft_config=config,
        )


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_a_full_disk_is_an_error_that_says_what_to_do(
    tiny_pair: TinyPair, lora_server: str, tmp_path: Path, adapter: bool
) -> None:
    """A limit on the size of files, for want of a small disk: the write fails in the same way."""
    model = adapted(tiny_pair.theta_model, lora())
    sync = LoraWeightSync(tmp_path) if adapter else DiskWeightSync(tmp_path)
    url = lora_server if adapter else tiny_pair.theta_url
    before, limits = served(url), resource.getrlimit(resource.RLIMIT_FSIZE)
    with DualRollout(replace(dual_config(tiny_pair), theta_url=url)) as rollout:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            with pytest.raises(WeightSyncError, match=r"GiB are free there\. Make room .* dual_weight_sync_dir"):
                sync.sync(Trainer(model), rollout)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [], "nothing is left of what was written"
    assert distance(served(url), before) < 1e-3


def test_a_compiled_run_with_a_reference_copy_serves_what_it_trains(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = Synced(
        model=adapted(tiny_pair.theta_model, lora(modules_to_save=["lm_head"])),
        reward_funcs=count_of_the,
        args=grpo_config(tmp_path, max_steps=1, beta=0.1, torch_compile=True, torch_compile_backend="eager"),
        train_dataset=chat_dataset(),
        processing_class=AutoTokenizer.from_pretrained(tiny_pair.theta_model),
        dual_config=dual_config(tiny_pair),
    )
    assert "ref" in trainer.model.peft_config
    with trainer.rollout:
        trainer.train()
    assert trainer.model_wrapped is not trainer.model, "it is compiled"
    assert max(trainer.errors) < ROUNDING
