"""`DualAsyncGRPOTrainer` on a CPU: the whole of it, and runs whose weights do not reach π_θ's server.

TRL's transfer needs two GPUs and its attention a kernel for them. Here weights go through a folder, and PyTorch does
the sums of that kernel; the rest of the trainer is TRL's.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import pickle
import queue
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
import trl.experimental.async_grpo
import trl.experimental.async_grpo.packing as packing
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.chat_template_utils import qwen3_template
from trl.experimental.async_grpo import AsyncGRPOConfig, async_rollout_worker
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample

import dual_rollout
from dual_rollout import (
    CoordinatorConfig,
    DualAsyncGRPOTrainer,
    DualRollout,
    GenerationOutput,
    compute_q_star,
    solve_kl_symmetry,
)
from dual_rollout.exceptions import WeightSyncError
from dual_rollout.training.async_grpo import DualRolloutWorker, _Conversation, _conversation
from dual_rollout.training.async_policy_check import AsyncPolicyCheck
from tests.async_loop import VERSION, make_loop, samples_of
from tests.documents import run_snippet, snippet
from tests.integration.conftest import TinyPair
from tests.integration.test_trainers import EVERY_THIRD, rows
from tests.integration.test_training import count_of_the
from tests.synced_training import lora_config
from tests.tiny_model import perturbed_copy

LENGTH = 5  # of the longest completion


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


class Kept:
    """The worker's queue, which keeps what was taken from it."""

    def __init__(self, samples: Any):
        self._samples = samples
        self.taken: list[RolloutSample] = []

    def get(self, timeout: float) -> RolloutSample:
        self.taken.append(self._samples.get(timeout=timeout))
        return self.taken[-1]

    def qsize(self) -> int:
        return int(self._samples.qsize())


@pytest.fixture
def config(tiny_pair: TinyPair) -> CoordinatorConfig:
    """Lists of the whole vocabulary, so that q* is known from the two models."""
    size = len(AutoTokenizer.from_pretrained(tiny_pair.theta_model))
    return CoordinatorConfig(
        theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=size, seed=5, decoding="lockstep"
    )


@pytest.fixture
def make(
    tiny_pair: TinyPair, config: CoordinatorConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(packing, "_flash_attn", lambda: SimpleNamespace(flash_attn_varlen_func=attention))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "no GPU")  # for figures of its speed
    with DualRollout(config) as rollout:

        def make(
            send: Callable[[torch.Tensor, int], torch.Tensor] = lambda tensor, number: tensor,
            *,
            model: Path = tiny_pair.theta_model,
            trainer_options: dict[str, Any] | None = None,
            **options: Any,
        ) -> Any:
            plain = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
            plain |= {"save_strategy": "no", "disable_tqdm": True, "vllm_server_base_url": tiny_pair.theta_url}
            plain |= {"max_steps": 2, "learning_rate": 1e-2, "token_budget": 48, "epsilon": 1.0, "epsilon_high": 2.0}
            tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
            tokenizer.response_template = qwen3_template  # ChatML, as the tiny models' template
            given = {
                "train_dataset": Dataset.from_list(rows()),
                "reward_funcs": count_of_the,
                "processing_class": tokenizer,
                "rollout_worker": Worker(),
                **(trainer_options or {}),
            }
            return DualAsyncGRPOTrainer(
                str(model),
                args=AsyncGRPOConfig(**{**plain, **options, "output_dir": str(tmp_path / "run")}),
                dual_config=config,
                weight_transfer=cast(Any, FolderTransfer(rollout, tmp_path / "weights", send)),
                **given,
            )

        yield make
        rollout.reload_policy_weights(str(tiny_pair.theta_model))


def check_samples(
    samples: Sequence[RolloutSample], dataset: list[dict[str, Any]], theta_model: Path, t_model: Path
) -> np.ndarray:
    """Their `old_log_probs`, which the loss divides by, are log q* of the two models on the row's two prompts.

    Returns π_θ/q* of all tokens, sample after sample.
    """
    tokenizer = AutoTokenizer.from_pretrained(theta_model)
    theta, t = (AutoModelForCausalLM.from_pretrained(folder) for folder in (theta_model, t_model))
    options = {"add_generation_prompt": True, "return_dict": False}
    by_prompt = {tuple(tokenizer.apply_chat_template(row["prompt"], **options)): row for row in dataset}
    weights = []
    for sample in samples:
        real = sample.completion_mask.astype(bool)
        prompt, completion = sample.input_ids[~real].tolist(), sample.input_ids[real].tolist()
        row = by_prompt[tuple(prompt)]

        def distributions(model: Any, prompt: list[int], completion: list[int] = completion) -> np.ndarray:
            with torch.no_grad():
                logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
            return logits.double().softmax(-1).numpy()

        probs_theta = distributions(theta, prompt)
        probs_t = distributions(t, tokenizer.apply_chat_template(row["t_prompt"], **options))
        q = compute_q_star(probs_theta, probs_t, solve_kl_symmetry(probs_theta, probs_t))
        q = probs_theta if row.get("t_target") == "none" else q
        drawn = (np.arange(len(completion)), completion)
        np.testing.assert_allclose(sample.old_log_probs[real], np.log(q[drawn]), atol=2e-3)
        weights.append(probs_theta[drawn] / q[drawn])
        assert not set(EVERY_THIRD) & set(completion[:-1]), "it goes on after an end that TRL knows"
        assert completion[-1] in (tokenizer.eos_token_id, *EVERY_THIRD) or len(completion) == LENGTH
    return np.concatenate(weights)


def test_the_whole_trainer(
    make: Callable[..., Any], tiny_pair: TinyPair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker draws in a process of its own, from the policy that the first transfer brought to π_θ's server.

    Nothing is learned, so one model explains all samples, however many transfers each has seen.
    """
    monkeypatch.setattr(async_rollout_worker, "is_vllm_available", lambda: True)
    policy = perturbed_copy(tiny_pair.theta_model, tmp_path / "policy", noise=0.2, seed=7)
    settings = json.loads((policy / "generation_config.json").read_text())
    (policy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": EVERY_THIRD}))
    trainer = make(
        model=policy,
        trainer_options={"rollout_worker": None},
        learning_rate=0.0,
        token_budget=0,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=LENGTH,
    )
    trainer.rollout_queue = kept = Kept(trainer.rollout_queue)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 2 and trainer.weight_transfer.number == 3
    for i, log in enumerate(logs):
        weights = check_samples(kept.taken[8 * i : 8 * (i + 1)], rows(), policy, tiny_pair.t_model)
        assert log["ratio"] == pytest.approx(weights.mean(), rel=1e-2) and np.abs(weights - 1).max() > 0.01
        assert log["sampling/policy_check"] < 1e-4
    # TRL logs what its worker measured when that arrives: all with the first step, of a worker that is ahead by then.
    alphas = [log["sampling/alpha/mean"] for log in logs if "sampling/alpha/mean" in log]
    assert alphas and all(0 < alpha < 1 for alpha in alphas)


@pytest.mark.parametrize("peft_config", [None, lora_config()], ids=["full", "merged adapter"])
def test_every_transfer_is_compared(make: Callable[..., Any], peft_config: Any) -> None:
    trainer = make(trainer_options={"peft_config": peft_config})
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
    trainer = make(weight_sync_steps=2)
    trainer.train()
    compared = ["sampling/policy_check" in log for log in trainer.state.log_history if "loss" in log]
    assert trainer.weight_transfer.number == 2 and compared == [True, True]  # the first log has the beginning's


def test_nccl_that_vllm_cannot_use_is_named(make: Callable[..., Any]) -> None:
    trainer = make()
    trainer.weight_transfer.model_update_group = SimpleNamespace(disabled=True)  # vLLM's communicator without a library
    with pytest.raises(WeightSyncError, match=r"sends nothing: vLLM cannot use NCCL.*VLLM_NCCL_SO_PATH"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_what_cannot_be_right_is_refused(make: Callable[..., Any], config: CoordinatorConfig) -> None:
    with pytest.raises(ValueError, match="bound must be above 0, got 0"):
        make(trainer_options={"policy_check_bound": 0.0})
    for options, named in (
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"epsilon": 0.2, "epsilon_high": None}, "epsilon=1.0 and epsilon_high=2.0"),
        ({"vllm_server_base_url": "http://localhost:1"}, "theta_url='" + str(config.theta_url)),
    ):
        with pytest.raises(ValueError, match=named):
            make(model=Path("no model"), **options)
    trainer = make()
    trainer._lora_sync = True  # TRL's answer to a server with --enable-lora
    with pytest.raises(ValueError, match="without --enable-lora"):
        AsyncPolicyCheck(trainer, config)


def test_the_trainer_of_the_document(
    make: Callable[..., Any], tiny_pair: TinyPair, config: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what `make` gives every trainer here, which takes the places of vLLM, of GPUs and of long runs."""
    source = snippet("docs/training.md", "DualAsyncGRPOTrainer")
    source = source.replace("http://theta:8000", tiny_pair.theta_url).replace("http://t:8000", tiny_pair.t_url)

    def trainer(model: str, *, args: dict[str, Any], dual_config: CoordinatorConfig, **given: Any) -> Any:
        assert (dual_config.theta_url, dual_config.t_url) == (config.theta_url, config.t_url)
        return make(model=Path(model), trainer_options=given, **{**args, "max_steps": 1})

    monkeypatch.setattr(trl.experimental.async_grpo, "AsyncGRPOConfig", dict)
    monkeypatch.setattr(dual_rollout, "DualAsyncGRPOTrainer", trainer)
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.response_template = qwen3_template
    names = {"model": str(tiny_pair.theta_model), "my_reward": count_of_the, "tokenizer": tokenizer}
    made = run_snippet(source, dataset=Dataset.from_list(rows()), **names)["trainer"]
    made.train()
    assert made.state.global_step == 1 and made.weight_transfer.number == 2


def test_the_asynchronous_worker_samples_from_q_star(tiny_pair: TinyPair, config: CoordinatorConfig) -> None:
    """TRL's own loop with our turns, here in a thread: its samples, and the sums and counts that it reports.

    In every fourth row no target takes part.
    """
    dataset = [{**row, "t_target": "none" if row["number"] % 4 == 3 else None} for row in rows()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.response_template = qwen3_template
    with DualRollout(config, tokenizer) as rollout:
        rollout.reload_policy_weights(str(tiny_pair.theta_model))
    loop = make_loop(
        dual_config=config,
        dataset=Dataset.from_list(dataset),
        reward_funcs=[count_of_the],
        processing_class=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id, *EVERY_THIRD],
        num_generations=2,
        max_tokens=LENGTH,
    )
    outputs, ask = list[GenerationOutput](), loop._coordinator.generate_batch

    async def recorded(*args: Any, **options: Any) -> list[GenerationOutput]:
        found = await ask(*args, **options)
        outputs.extend(found)
        return found

    loop._coordinator.generate_batch = recorded  # type: ignore[method-assign]
    drawn = samples_of(loop, 8)
    check_samples(drawn, dataset, tiny_pair.theta_model, tiny_pair.t_model)
    assert all(sample.model_version == VERSION for sample in drawn)
    assert {output.without_target[0] for output in outputs} == {False, True}
    same_prompt = [(a, b) for a, b in itertools.combinations(drawn, 2) if a.group_id == b.group_id]
    assert any(a.input_ids.tolist() != b.input_ids.tolist() for a, b in same_prompt), "turns have their own streams"
    metrics = [dict(loop._rates)]
    with contextlib.suppress(queue.Empty):
        while True:
            metrics.append(loop._metrics_queue.get_nowait())
    for name, column in (("alpha", "alpha_history"), ("importance_sampling_ratio", "importance_weights")):
        sums = np.sum([pushed.get(f"sampling/{name}/mean", (0.0, 0.0)) for pushed in metrics], axis=0)
        values = np.concatenate([getattr(output, column) for output in outputs])
        np.testing.assert_allclose(sums, (values.sum(), len(values)))


def test_the_asynchronous_worker_says_if_the_target_adds_nothing(
    tiny_pair: TinyPair, config: CoordinatorConfig, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.response_template = qwen3_template
    loop = make_loop(
        dual_config=replace(config, t_url=config.theta_url),
        dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows()]),
        reward_funcs=[count_of_the],
        processing_class=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id],
        num_generations=2,
        max_tokens=LENGTH,
    )

    async def turns() -> None:
        _conversation.set(_Conversation(None, None))
        async with loop._coordinator:
            for _ in range(16):  # of one token at least
                await loop._generate_one_turn([5, 6, 7])

    asyncio.run(turns())
    (said,) = [record.message for record in caplog.records if "adds nothing" in record.message]
    assert "no column 't_prompt'" in said


def test_the_asynchronous_worker_refuses_what_q_star_cannot_honour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trl.experimental.async_grpo.async_rollout_worker.is_vllm_available", lambda: True)
    worker = DualRolloutWorker(dual_config=CoordinatorConfig(), top_p=1.0, top_k=0, reward_funcs=[count_of_the])
    pickle.dumps((worker._loop_cls, worker._loop_kwargs))  # they go to a process of its own
    for options, named in (({"top_p": 0.9}, "top_p"), ({"lora_name": "trl-policy"}, "lora_name")):
        with pytest.raises(ValueError, match=named):
            DualRolloutWorker(dual_config=CoordinatorConfig(), **options)
