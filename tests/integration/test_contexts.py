"""What π_t sees and which π_t it is, in training and in `generate`; random streams; and what is refused."""

from __future__ import annotations

import dataclasses
import logging
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from dual_rollout import CoordinatorConfig, DualGRPOTrainer, DualRLOOTrainer, DualRollout
from dual_rollout.exceptions import RolloutError
from dual_rollout.training.contexts import TargetContextsByPrompt
from dual_rollout.training.rollout_mixin import check_columns
from dual_rollout.training.trl_settings import check_rollout_is_all
from tests.hang import HANG
from tests.integration.conftest import TinyPair
from tests.integration.test_trainers import ObservedGRPO, ObservedRLOO, check_target, rloo_config, row_key, rows, run
from tests.integration.test_training import count_of_the, dual_config, grpo_config

SECRET = [{"role": "user", "content": "the user"}]


def plain_run(pair: TinyPair, folder: Path, dataset: Any, **options: Any) -> list[dict[str, Any]]:
    """A `GRPOTrainer` with the rollout function alone: the columns that its reward function saw, per rollout."""
    seen: list[dict[str, Any]] = []

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        seen.append(columns)
        return count_of_the(completions)

    arguments = {"eval_dataset": options.pop("eval_dataset")} if "eval_dataset" in options else {}
    evaluate_on = options.pop("evaluate_on", None)
    with DualRollout(options.pop("config", None) or dual_config(pair), allow_uncorrected=True) as rollout:
        trainer = GRPOTrainer(
            model=str(pair.theta_model),
            reward_funcs=reward,
            args=grpo_config(folder, **{"max_steps": 2, "learning_rate": 0.0, **options}),
            train_dataset=dataset,
            rollout_func=rollout,
            **arguments,
        )
        trainer.train()
        if evaluate_on is not None:
            trainer.evaluate(evaluate_on)
    return seen


def target_logprobs(model: Any, tokenizer: Any, prompt: Any, completion: list[int]) -> list[float]:
    options = {"add_generation_prompt": True, "return_dict": True}
    ids = tokenizer(prompt) if isinstance(prompt, str) else tokenizer.apply_chat_template(prompt, **options)
    context = ids["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*context, *completion]])).logits[0, len(context) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1).tolist()


def check_rows(pair: TinyPair, columns: dict[str, Any]) -> None:
    """log π_t of every row is that of its own `t_prompt`."""
    model = AutoModelForCausalLM.from_pretrained(pair.t_model)
    tokenizer = AutoTokenizer.from_pretrained(pair.t_model)
    for prompt, ids, logprobs in zip(
        columns["t_prompt"], columns["completion_ids"], columns["logprobs_t"], strict=True
    ):
        assert logprobs == pytest.approx(target_logprobs(model, tokenizer, prompt, ids), abs=1e-3)


def test_a_plain_trainer_finds_the_contexts_of_its_prompts(tiny_pair: TinyPair, tmp_path: Path) -> None:
    options = {"eval_dataset": {"held_out": Dataset.from_list(rows()[4:])}, "eval_strategy": "steps", "eval_steps": 1}
    seen = plain_run(tiny_pair, tmp_path, Dataset.from_list(rows()), per_device_eval_batch_size=4, **options)
    assert len(seen) == 2 + 2 * 2, "two rollouts, and after each an evaluation in two batches"
    for i, columns in enumerate(seen):
        if i % 3 == 0:
            check_rows(tiny_pair, columns)
        else:  # an evaluation is of the policy alone
            assert {alpha for row in columns["alpha"] for alpha in row} == {0.0}
            assert {weight for row in columns["importance_weights"] for weight in row} == {1.0}
            assert all(math.isnan(value) for row in columns["logprobs_t"] for value in row)


class Looked:
    """Just what a lookup reads of a trainer."""

    def __init__(self, train_dataset: Any):
        self.train_dataset = train_dataset


def test_what_a_lookup_cannot_tell_is_refused() -> None:
    prompt = rows()[0]["prompt"]
    twice = Looked(Dataset.from_list([*rows(), {**rows()[0], "t_prompt": SECRET}]))
    with pytest.raises(ValueError, match="two rows have one prompt"):
        TargetContextsByPrompt().find([prompt], twice)
    same = TargetContextsByPrompt().find([prompt], Looked(Dataset.from_list([*rows(), *rows()])))
    assert same.t_prompts == [rows()[0]["t_prompt"]], "the same row twice is no conflict"
    with pytest.raises(ValueError, match="streamed dataset: use DualGRPOTrainer"):
        TargetContextsByPrompt().find([prompt], Looked(IterableDataset.from_generator(rows)))
    with pytest.raises(ValueError, match="not in the trainer's train_dataset"):
        TargetContextsByPrompt().find([SECRET], Looked(Dataset.from_list(rows())))
    without = Dataset.from_list([{"prompt": prompt}])
    assert TargetContextsByPrompt().find([SECRET], Looked(without)).t_prompts is None, "no columns, nothing to look up"


def test_rows_without_a_context(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Null in a column: π_t sees the prompt itself."""
    some = [{**row, "t_prompt": row["t_prompt"] if row["number"] % 2 else None} for row in rows()]
    trainer = run(tiny_pair, tmp_path, dataset=Dataset.from_list(some), max_steps=2)
    for row in [row for rollout in trainer.rollouts for row in rollout.rows]:
        row["t_prompt"] = row["prompt"] if row["t_prompt"] is None else row["t_prompt"]
    check_target(trainer, tiny_pair)


@pytest.fixture
def routed(tiny_pair: TinyPair) -> CoordinatorConfig:
    """The target "mirror" is π_θ's own server, so that log π_t tells from which one it came."""
    return dual_config(tiny_pair, targets={"mirror": tiny_pair.theta_url})


def check_routes(targets: list[str | None], columns: dict[str, Any]) -> None:
    assert {*targets} == {None, "mirror", "none"}, "the test needs rows of every kind"
    for i, target in enumerate(targets):
        theta, t = (torch.tensor(columns[f"logprobs_{side}"][i]) for side in ("theta", "t"))
        if target == "none":
            assert set(columns["alpha"][i]) == {0.0}
            assert columns["importance_weights"][i] == pytest.approx([1.0] * len(theta))
            assert t.isnan().all()
        elif target == "mirror":
            torch.testing.assert_close(theta, t, atol=1e-4, rtol=0)
            assert columns["alpha"][i] == pytest.approx([0.5] * len(theta), abs=1e-3)
        else:
            assert (theta - t).abs().max() > 1e-2


def routed_rows() -> list[dict[str, Any]]:
    return [{"prompt": row["prompt"], "t_target": [None, "mirror", "none"][row["number"] % 3]} for row in rows()]


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_rows_go_to_their_targets(tiny_pair: TinyPair, tmp_path: Path, routed: CoordinatorConfig, kind: type) -> None:
    options = {"max_steps": 1, "per_device_train_batch_size": 16, "beta": 0.0}
    trainer = run(tiny_pair, tmp_path, kind, config=routed, dataset=Dataset.from_list(routed_rows()), **options)
    rollout, (_, batch) = trainer.rollouts[0], trainer.losses[0]
    names = ("alpha", "importance_weights", "logprobs_theta", "logprobs_t")
    check_routes([row["t_target"] for row in rollout.rows], {n: [row[n] for row in rollout.rows] for n in names})
    alone = {row_key(rollout.batch, j) for j, row in enumerate(rollout.rows) if row["t_target"] == "none"}
    for i in range(len(batch["alpha"])):
        if row_key(batch, i) in alone:
            torch.testing.assert_close(batch["importance_sampling_ratio"][i], torch.ones(6), atol=1e-3, rtol=0)
    logs = trainer.state.log_history[0]
    expected = sum(len(row["alpha"]) for row in rollout.rows if row["t_target"] == "none")
    assert logs["rollout/policy_only_tokens"] == expected and logs["rollout/lost_target_tokens"] == 0
    needing_t = ("kl_residual/max", "top_k_mass/min", "top_k_mass/mean", "alpha/mean", "rollout_weight/mean")
    assert all(math.isfinite(logs[f"sampling/{name}"]) for name in needing_t)


def test_rows_of_a_plain_trainer_go_to_their_targets(
    tiny_pair: TinyPair, tmp_path: Path, routed: CoordinatorConfig
) -> None:
    dataset = Dataset.from_list(routed_rows())
    options = {"max_steps": 1, "per_device_train_batch_size": 16}
    (columns,) = plain_run(tiny_pair, tmp_path, dataset, config=routed, **options)
    check_routes(columns["t_target"], columns)


def test_generate_takes_prompts_and_targets(tiny_pair: TinyPair, routed: CoordinatorConfig) -> None:
    prompts = [row["prompt"] for row in rows()[:3]]
    t_prompts = [row["t_prompt"] for row in rows()[:2]] + [prompts[2]]
    with DualRollout(routed) as rollout:
        batch = rollout.generate(
            prompts, t_prompts=t_prompts, targets=[None, "none", None], num_generations=2, max_tokens=4
        )
        tokenizer = rollout._open().tokenizer
        with pytest.raises(ValueError, match="elsewhere"):
            rollout.generate(prompts, targets=["elsewhere", None, None], max_tokens=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.t_model)
    for i in (0, 1, 4, 5):
        ids = batch.completion_ids[i][batch.completion_mask[i].bool()].tolist()
        expected = target_logprobs(model, tokenizer, t_prompts[i // 2], ids)
        assert batch.logprobs_t[i, : len(ids)].tolist() == pytest.approx(expected, abs=1e-3)
    assert batch.logprobs_t[2:4][batch.completion_mask[2:4].bool()].isnan().all()
    assert (batch.alpha[2:4] == 0).all() and batch.alpha[0].max() > 0


def test_template_arguments_reach_both_models(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """`chat_template_kwargs`, for example of a template that can be told not to think."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.chat_template = tokenizer.chat_template + "{% if mark is defined %}{{ mark }}{% endif %}"
    options = {"model": str(tiny_pair.theta_model), "processing_class": tokenizer, "reward_funcs": count_of_the}
    options |= {"train_dataset": Dataset.from_list(rows()), "dual_config": dual_config(tiny_pair)}
    for kind, configure in ((ObservedGRPO, grpo_config), (ObservedRLOO, rloo_config)):
        args = configure(tmp_path, max_steps=1, chat_template_kwargs={"mark": "is of"})
        trainer = kind(args=args, **options)
        with trainer.rollout:
            trainer.train()
        batch = trainer.rollouts[0].batch
        texts = tokenizer.batch_decode(batch["prompt_ids"])
        assert all(text.endswith("assistant\nis of") for text in texts)
        marked = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
        marked.chat_template = tokenizer.chat_template.replace("{% if mark is defined %}{{ mark }}{% endif %}", "is of")
        trainer.processing_class = marked
        check_target(trainer, tiny_pair)


def test_template_arguments_are_those_of_each_trainer(tiny_pair: TinyPair, tmp_path: Path) -> None:
    """Also where the rollout was given a tokenizer, or was used by another trainer before."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.chat_template = tokenizer.chat_template + "{% if mark is defined %}{{ mark }}{% endif %}"
    seen: list[str] = []
    for given in (tokenizer, None):
        with DualRollout(dual_config(tiny_pair), given, allow_uncorrected=True) as rollout:

            def observed(prompts: Any, trainer: Any, rollout: DualRollout = rollout) -> Any:
                output = rollout(prompts, trainer)
                seen.extend(tokenizer.batch_decode(output["prompt_ids"][:1]))
                return output

            for mark in ("is of", "to in"):
                GRPOTrainer(
                    model=str(tiny_pair.theta_model),
                    processing_class=tokenizer,
                    reward_funcs=count_of_the,
                    args=grpo_config(tmp_path, max_steps=1, chat_template_kwargs={"mark": mark}),
                    train_dataset=Dataset.from_list(rows()),
                    rollout_func=observed,
                ).train()
    assert [text.rpartition("assistant\n")[2] for text in seen] == ["is of", "to in"] * 2


TURNS = [
    {"role": "user", "content": "what", "name": "ann"},
    {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}]},
    {"role": "tool", "content": "<|im_end|>"},
]


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_a_trainer_sees_the_prompts_that_generate_sees(tiny_pair: TinyPair, tmp_path: Path, kind: type) -> None:
    """A turn of tool calls, null keys, a special token's name: the same ids under GRPO, RLOO and without a trainer."""
    prompts: list[Any] = [TURNS, [{"role": "user", "content": "is that"}]]
    trainer = run(
        tiny_pair,
        tmp_path,
        kind,
        dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        max_steps=1,
    )
    with DualRollout(dual_config(tiny_pair)) as rollout:
        alone = rollout.generate(prompts, max_tokens=1)
    expected = {tuple(ids[mask.bool()].tolist()) for ids, mask in zip(alone.prompt_ids, alone.prompt_mask, strict=True)}
    batch = trainer.rollouts[0].batch
    found = {
        tuple(row[mask.bool()].tolist()) for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
    }
    assert found == expected and len(found) == 2
    shown = [turn for row in trainer.rollouts[0].rows for turn in row["prompt"]]
    assert all(value is not None or key == "content" for turn in shown for key, value in turn.items())


def test_a_resumed_run_has_the_streams_of_one_that_was_not_stopped(tiny_pair: TinyPair, tmp_path: Path) -> None:
    whole = run(tiny_pair, tmp_path, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    again = ObservedGRPO(
        model=str(tiny_pair.theta_model),
        args=grpo_config(tmp_path / "again", max_steps=3),
        reward_funcs=count_of_the,
        train_dataset=Dataset.from_list(rows()),
        dual_config=dual_config(tiny_pair),
        importance_sampling_clip_max=1.3,
    )
    with again.rollout:
        again.train(resume_from_checkpoint=str(checkpoint))
    assert [r.step for r in again.rollouts] == [1, 2]
    for resumed, original in zip(again.rollouts, whole.rollouts[1:], strict=True):
        assert torch.equal(resumed.batch["completion_ids"], original.batch["completion_ids"])


def test_training_twice_begins_with_the_weights_as_they_are(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = ObservedGRPO(
        model=str(tiny_pair.theta_model),
        args=grpo_config(tmp_path, max_steps=1),
        reward_funcs=count_of_the,
        train_dataset=Dataset.from_list(rows()),
        dual_config=dual_config(tiny_pair),
    )
    with trainer.rollout:
        trainer.train()
        trainer.train()
    drift = [entry["sampling/policy_drift/max"] for entry in trainer.state.log_history if "reward" in entry]
    assert drift and max(drift) < 1e-3
    first, second = trainer.rollouts
    assert first.step == second.step == 0
    batch = second.batch
    torch.testing.assert_close(batch["logprobs_theta"], second.policy, atol=1e-3, rtol=0)


def test_the_best_model_is_sent_when_it_has_come_back(tiny_pair: TinyPair, tmp_path: Path) -> None:
    held_out = Dataset.from_list(rows()[:2])
    options: dict[str, Any] = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "num_tokens"}
    options |= {"greater_is_better": False, "per_device_eval_batch_size": 4}  # the first one has seen the fewest tokens
    trainer = run(tiny_pair, tmp_path, eval_dataset=held_out, **options)
    assert trainer.state.best_global_step == 1
    with trainer.rollout:
        trainer.evaluate()
    last = trainer.rollouts[-1]
    real = last.batch["completion_mask"].bool()
    torch.testing.assert_close(last.batch["logprobs_theta"][real], last.policy[real], atol=1e-3, rtol=0)


def test_streams(tiny_pair: TinyPair) -> None:
    """Without a seed each call is fresh, and decoding may draft; with one, calls differ and repeat in another life."""
    prompts = ["the user", "what is that of"]
    with DualRollout(CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20)) as rollout:
        assert rollout._seed("train", 0, 0) is None
        first, second = (rollout.generate(prompts, max_tokens=6).completion_ids for _ in range(2))
        assert first.shape != second.shape or not torch.equal(first, second)
    lives = []
    for _ in range(2):
        rollout = DualRollout(dual_config(tiny_pair))
        lives.append([rollout._seed(mode, step, process) for mode, step, process in STREAMS])
    assert lives[0] == lives[1] and len(set(lives[0])) == len(STREAMS)
    resumed = DualRollout(dual_config(tiny_pair))
    assert [resumed._seed("train", 1, 0), resumed._seed("eval", 1, 0)] == lives[0][-2:]


STREAMS = [("train", 0, 0), ("train", 0, 0), ("eval", 0, 0), ("eval", 0, 0), ("train", 0, 1), ("loop", 0, 0)]
STREAMS += [("train", 1, 0), ("eval", 1, 0)]


def test_acceptance_is_logged_where_tokens_were_drafted(tiny_pair: TinyPair, tmp_path: Path) -> None:
    trainer = run(tiny_pair, tmp_path, max_steps=1, config=dual_config(tiny_pair, decoding="block"))
    assert 0 < trainer.state.log_history[0]["spec_decode/acceptance_rate"] <= 1
    trainer = run(tiny_pair, tmp_path, max_steps=1, config=dual_config(tiny_pair, decoding="lockstep"))
    assert "spec_decode/acceptance_rate" not in trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        (DualGRPOTrainer, {"generation_kwargs": {"length_penalty": 2.0}}, "generation_kwargs"),
        (DualGRPOTrainer, {"loss_type": "sft"}, "loss_type"),
        (
            DualGRPOTrainer,
            {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_mode": "token_truncate"},
            "importance_sampling_mode and its bounds do nothing",
        ),
        (DualRLOOTrainer, {"use_vllm": True, "vllm_mode": "server"}, "use_vllm"),
        (DualRLOOTrainer, {"top_p": 0.5}, "top_p"),
    ],
)
def test_what_a_trainer_may_not_ask_is_refused_before_a_model_is_loaded(
    tmp_path: Path, kind: type, options: dict[str, Any], named: str
) -> None:
    configure = rloo_config if kind is DualRLOOTrainer else grpo_config
    with pytest.raises(ValueError, match=named):
        kind(
            model=str(tmp_path / "none"),
            args=configure(tmp_path, **options),
            reward_funcs=count_of_the,
            train_dataset=Dataset.from_list(rows()),
            dual_config=CoordinatorConfig(),
            importance_sampling_mode="token_mask",
        )


def test_images_and_tools_are_refused() -> None:
    picture = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is that"}]}]
    trainer = Looked(Dataset.from_list(rows()))
    with pytest.raises(ValueError, match="image"):
        check_rollout_is_all(trainer, [picture])
    check_rollout_is_all(trainer, [[{**picture[0], "content": picture[0]["content"][1:]}], "the user", [1, 2]])
    trainer.tools = [print]
    with pytest.raises(ValueError, match="tools"):
        check_rollout_is_all(trainer, ["the user"])


def test_images_are_refused_in_rloo() -> None:
    trainer = DualRLOOTrainer.__new__(DualRLOOTrainer)
    with pytest.raises(ValueError, match="image"):
        trainer._tokenize_prompts([[{"role": "user", "content": [{"type": "image"}]}]])


def test_columns_that_the_rollout_would_overwrite_are_refused() -> None:
    check_columns(Dataset.from_list(rows()))
    check_columns(None)
    taken = [{**row, "logprobs_t": 0.0, "alpha": 1.0} for row in rows()]
    for dataset in (Dataset.from_list(taken), IterableDataset.from_generator(lambda: iter(taken))):
        with pytest.raises(ValueError, match="alpha, logprobs_t would be overwritten"):
            check_columns(dataset)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"prompts": "hello"}, "prompts must be a list"),
        ({"prompts": []}, "prompts must be a list of at least one"),
        ({"num_generations": 0}, "num_generations"),
        ({"t_prompts": ["one"]}, "t_prompts must have one entry per prompt"),
        ({"targets": "no"}, "targets must have one entry per prompt"),
    ],
)
def test_generate_names_wrong_arguments(arguments: dict[str, Any], named: str) -> None:
    with DualRollout(CoordinatorConfig()) as rollout, pytest.raises(ValueError, match=named):
        rollout.generate(**{"prompts": ["a", "b"], **arguments})


def test_generate_draws_by_the_config_of_the_moment(tiny_pair: TinyPair) -> None:
    """A loop of one's own may bound α between two rollouts, as recipes/examples/ppo_loop.py does."""
    config = CoordinatorConfig(theta_url=tiny_pair.theta_url, t_url=tiny_pair.t_url, top_k=20, seed=3)
    with DualRollout(config) as rollout:
        free = rollout.generate(["5 6 7"], max_tokens=8)
        rollout.config = replace(config, alpha_max=0.1, temperature=0.5)
        bounded = rollout.generate(["5 6 7"], max_tokens=8)
        rollout.config = replace(config, alpha_method="fixed", fixed_alpha=0.0)
        policy = rollout.generate(["5 6 7"], max_tokens=8)
    assert free.alpha.max() > 0.1
    assert 0 < bounded.alpha[bounded.completion_mask.bool()].max() <= 0.1
    assert policy.alpha.max() == 0.0


def test_generate_has_a_stream_for_each_process_and_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    for process in (0, 1):
        monkeypatch.setattr("dual_rollout.training.rollout.process_index", lambda process=process: process)
        rollout = DualRollout(CoordinatorConfig(seed=3))

        def generated(*args: Any, stream: tuple[str, int, int], rollout: DualRollout = rollout, **_: Any) -> Any:
            seeds.append(rollout._seed(*stream))
            raise RolloutError("enough")

        monkeypatch.setattr(rollout, "_generate", generated)
        for _ in range(2):
            with pytest.raises(RolloutError):
                rollout.generate(["a"])
    assert len(set(seeds)) == 4


def test_what_several_processes_should_know_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    trainer = Looked(None)
    trainer.model, trainer.accelerator = torch.nn.Linear(1, 1), SimpleNamespace(num_processes=2)
    for config, named in (
        (CoordinatorConfig(support="tail"), "garble"),
        (CoordinatorConfig(missing="exact"), "garble"),
    ):
        caplog.clear()
        rollout = DualRollout(config)
        for _ in range(2):
            rollout._warn_of_settings(trainer)
        assert [named in record.message for record in caplog.records] == [True]
    caplog.clear()
    DualRollout(CoordinatorConfig())._warn_of_settings(trainer)
    trainer.accelerator.num_processes = 1
    DualRollout(CoordinatorConfig(support="tail"))._warn_of_settings(trainer)
    assert not caplog.records


@pytest.mark.parametrize(
    ("options", "named"),
    [({}, "applies no importance weights"), ({"use_vllm": True}, "vllm_importance_sampling_correction=False leaves")],
)
def test_a_trainer_that_corrects_nothing_is_refused(options: dict[str, Any], named: str) -> None:
    args = GRPOConfig(use_cpu=True, bf16=False, report_to="none", vllm_importance_sampling_correction=False)
    trainer = SimpleNamespace(args=args, **{"use_vllm": False, **options})
    with pytest.raises(ValueError, match=f"{named}.* set allow_uncorrected=True in DualRollout"):
        DualRollout(CoordinatorConfig())(["the user"], trainer)


def said_of_the_target(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "adds nothing" in record.message]


def test_a_target_that_is_the_policy_is_said_once(
    tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = dataclasses.replace(dual_config(tiny_pair), t_url=tiny_pair.theta_url)
    with DualRollout(same) as rollout:
        rollout.generate(["what is that"], max_tokens=3)
        assert not said_of_the_target(caplog), "three tokens do not tell"
        rollout.generate(["what is that"] * 8, targets=["none"] * 8, max_tokens=16)
        assert not said_of_the_target(caplog), "tokens without a target even less"
        for _ in range(2):
            rollout.generate(["what is that"] * 4, max_tokens=8)
    (message,) = said_of_the_target(caplog)
    assert "no t_prompts were given" in message
    caplog.clear()
    misspelt = [{"prompt": row["prompt"], "t_promt": row["t_prompt"]} for row in rows()]
    run(tiny_pair, tmp_path, config=same, dataset=Dataset.from_list(misspelt), max_steps=2, learning_rate=0.0)
    (message,) = said_of_the_target(caplog)
    assert "no column 't_prompt'" in message and "did you mean 't_promt'?" in message
    caplog.clear()
    with DualRollout(same) as rollout:
        rollout.generate(["what is that"], t_prompts=["the user"], max_tokens=16)
    with DualRollout(dual_config(tiny_pair)) as rollout:
        rollout.generate(["what is that"], max_tokens=16)
    assert not said_of_the_target(caplog)


AT_EXIT = """
import gc, os, sys, weakref
from dual_rollout import CoordinatorConfig, DualRollout
config = CoordinatorConfig(theta_url=sys.argv[1], t_url=sys.argv[2], top_k=20, seed=1)
def draw(rollout):
    return rollout.generate(["the user"], max_tokens=4).completion_ids.tolist()
collected = DualRollout(config)
expected = [draw(collected), draw(collected)]
del collected
gc.collect()
rollout = DualRollout(config)
assert draw(rollout) == expected[0]
child = os.fork()
if child == 0:
    ok = draw(rollout) == expected[1]
    rollout.close()
    os._exit(0 if ok else 1)
assert os.waitpid(child, 0)[1] == 0, "what a forked process draws"
assert draw(rollout) == expected[1], "the parent goes on"
rollout.weight_version = 1
child = os.fork()
if child == 0:
    try:
        draw(rollout)
    except ValueError as error:
        os._exit(0 if "forked" in str(error) else 1)
    os._exit(1)
assert os.waitpid(child, 0)[1] == 0, "a forked process does not know of the weights"
print("drawn")
"""


def test_a_rollout_closes_itself_and_survives_a_fork(tiny_pair: TinyPair) -> None:
    """Neither `close()` nor `with`: nothing is said of unclosed connections, at the end or when it is collected."""
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", AT_EXIT, tiny_pair.theta_url, tiny_pair.t_url]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=HANG, check=False)
    assert ended.returncode == 0 and ended.stdout == "drawn\n", ended.stderr
    assert "nclosed" not in ended.stderr


def test_args_none_is_no_args() -> None:
    errors = []
    for more in ({}, {"args": None}):
        with pytest.raises((ValueError, OSError)) as raised:  # TRL's defaults on this machine, or the model's name
            DualGRPOTrainer(
                model="no/model",
                reward_funcs=count_of_the,
                train_dataset=Dataset.from_list(rows()),
                dual_config=CoordinatorConfig(),
                **more,
            )
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def test_a_plain_trainer_is_warned_once(tiny_pair: TinyPair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="dual_rollout.training.rollout"):
        plain_run(tiny_pair, tmp_path, Dataset.from_list(rows()))
    assert sum("applies no importance weights" in record.message for record in caplog.records) == 1
