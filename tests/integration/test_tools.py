"""Tools and environments: every turn is drawn from q*, and tools' results are nobody's tokens.

The servers list the whole vocabulary, so that q* of every position is known from two plain forwards: π_θ's over the
policy's prompt and completion, π_t's over its own prompt and the same completion. `tests/tool_model.py` makes the
models; what the tools answer is in the prompt of the next turn.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from dual_rollout import (
    CoordinatorConfig,
    DualDistillationTrainer,
    DualGRPOTrainer,
    DualRollout,
    compute_q_star,
    solve_kl_symmetry,
)
from dual_rollout.record import SequenceRecord
from dual_rollout.training.contexts import TargetContexts, same_turns
from dual_rollout.training.turns import Turns, rows_with_results
from dual_rollout.types import GenerationOutput
from tests.async_loop import make_loop, samples_of
from tests.documents import run_snippet, snippet
from tests.integration.conftest import TinyPair
from tests.integration.test_distillation import distillation_config
from tests.integration.test_training import grpo_config
from tests.runs import finish, start, two_processes_of
from tests.tool_model import call, make_tool_pair, tool_tokenizer
from tests.warm_servers import WarmServer

LENGTH = 120
CALLS = [
    call("add", a=2, b=3),
    call("add", a=2, b=3) + call("divide", a=8, b=2),
    call("divide", a=1, b=0),
    call("look"),
]


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def divide(a: int, b: int) -> float:
    """Divide two numbers.

    Args:
        a: the first
        b: the second
    """
    return a / b


class School:
    """An environment whose task stands in its first observation. For every second row it is over at once."""

    def reset(self, **row: Any) -> str:
        self.sums, self.over = 0, row["number"] % 2 == 1
        return f" in {row['number']}"

    def add(self, a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        self.sums += 1
        if self.over:
            raise ValueError("over")
        return a + b

    def get_reward(self) -> float:
        return float(self.sums)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinyPair]:
    theta_model, t_model = make_tool_pair(tmp_path_factory.mktemp("tools"), CALLS)
    flags = ["--max-logprobs", "-1", "--max-model-len", "320", "--threads", "1"]
    with WarmServer(theta_model, flags) as theta, WarmServer(t_model, flags) as t:
        yield TinyPair(theta_model, t_model, theta.url, t.url)


def rows() -> list[dict[str, Any]]:
    """The second and fourth have a `t_prompt`; the first's and the second's prompts are the same."""
    texts = ["what is that", "what is that", "and to the", "the user of what"]

    def prompt(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": text}]

    return [
        {"prompt": prompt(text), "t_prompt": prompt(f"{text} {i}") if i % 2 else None, "number": i}
        for i, text in enumerate(texts)
    ]


class Observed:
    """Keeps each rollout's rows and batch, and π_θ's next-token distributions, `(B, T, V)`, at that moment."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.seen: list[tuple[list[dict[str, Any]], dict[str, Any], torch.Tensor, dict[str, Any]]] = []
        super().__init__(*args, **kwargs)

    def _generate(self, prompts: Any) -> Any:
        generated = super()._generate(prompts)
        self.columns = dict(self._rollout_columns) if self.rollout_func is None else generated[5]
        self.messages = generated[3] or []
        return generated

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super()._generate_and_score_completions(inputs)
        kept = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        probs = distributions(self.model, prompts_of(batch), batch)
        self.seen.append(([dict(row) for row in inputs], kept, probs, self.columns))
        return batch


class ObservedGRPO(Observed, DualGRPOTrainer):
    pass


class ObservedDistillation(Observed, DualDistillationTrainer):
    rollout_func = None


def prompts_of(batch: dict[str, Any]) -> list[list[int]]:
    return [ids[mask.bool()].tolist() for ids, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)]


def distributions(model: Any, prompts: list[list[int]], batch: dict[str, Any]) -> torch.Tensor:
    """`(B, T, V)` float64 probabilities at every completion token, by a plain forward of each row alone."""
    found = []
    for prompt, completion in zip(prompts, batch["completion_ids"], strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + completion.tolist()])).logits[0, len(prompt) - 1 : -1]
        found.append(logits.double().softmax(-1))
    return torch.stack(found)


def dual_config(pair: TinyPair) -> CoordinatorConfig:
    return CoordinatorConfig(theta_url=pair.theta_url, t_url=pair.t_url, top_k=len(tool_tokenizer(CALLS)), seed=3)


def run(pair: TinyPair, folder: Path, copies: int = 1, **options: Any) -> ObservedGRPO:
    """Train two steps; `copies` of the rows are the questions of a step in as many processes."""
    grpo = {
        "max_completion_length": LENGTH,
        "max_steps": 2,
        "per_device_train_batch_size": 8,
        **options.pop("grpo", {}),
    }
    trainer = ObservedGRPO(
        model=str(pair.theta_model),
        args=grpo_config(folder, **grpo),
        train_dataset=Dataset.from_list(rows() * copies),
        dual_config=dual_config(pair),
        **options,
    )
    with trainer.rollout:
        trainer.train()
    return trainer


def lengths(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(len(ids)) for ids in completion_ids]


def check(trainer: Any, pair: TinyPair, t_prompts: Any, tools: list[Any]) -> list[list[list[int]]]:
    """All numbers of every drawn token, and none of the others. Returns each row's turns, as indices of its tokens."""
    t_model = AutoModelForCausalLM.from_pretrained(pair.t_model)
    tokenizer, found = trainer.processing_class, []
    for inputs, batch, probs_theta, columns in trainer.seen:
        own = prompts_of(batch)
        others = [t_prompts(row) for row in inputs]
        options = {"tools": tools, "add_generation_prompt": True, "return_dict": True}
        t_ids = [
            ids if other is None else tokenizer.apply_chat_template(other, **options)["input_ids"]
            for ids, other in zip(own, others, strict=True)
        ]
        assert any(ids != t for ids, t in zip(own, t_ids, strict=True))
        probs_t = distributions(t_model, t_ids, batch)
        for i in range(len(inputs)):
            length = int(batch["completion_mask"][i].sum())
            tokens, drawn = batch["completion_ids"][i][:length], batch["tool_mask"][i][:length].bool().numpy()
            assert length <= trainer.max_completion_length and drawn[0]
            p, t = (probs[i][:length].numpy() for probs in (probs_theta, probs_t))
            alpha = solve_kl_symmetry(p, t)
            q = compute_q_star(p, t, alpha)
            at = (np.arange(length), tokens.numpy())
            expected = {"alpha": alpha, "logprobs_q": np.log(q[at])}
            expected |= {"logprobs_theta": np.log(p[at]), "logprobs_t": np.log(t[at])}
            expected["importance_weights"] = np.exp(expected["logprobs_theta"] - expected["logprobs_q"])
            for name, values in expected.items():
                column = np.array(columns[name][i])
                np.testing.assert_allclose(column[drawn], values[drawn], atol=5e-3, rtol=5e-3, err_msg=name)
                assert len(column) == length and np.isnan(column[~drawn]).all()
            if "importance_sampling_ratio" in batch:
                ratio = batch["importance_sampling_ratio"][i]
                assert (ratio[:length][~drawn] == 1).all() and (ratio[length:] == 1).all()
                weights = torch.from_numpy(expected["importance_weights"]).float().clamp(max=3.0)
                torch.testing.assert_close(ratio[:length][drawn], weights[drawn], atol=1e-2, rtol=1e-2)
                assert not batch["advantages"][i].isnan().any()
            runs = [
                [i for i, _ in group] for key, group in itertools.groupby(enumerate(drawn), lambda x: bool(x[1])) if key
            ]
            for turn in runs:  # each ends at the stop token, or where there is room for no more
                ends = [int(tokens[j]) in trainer.eos_token_ids for j in turn]
                assert not any(ends[:-1]) and (ends[-1] or turn[-1] == trainer.max_completion_length - 1)
            found.append(runs)
    return found


def test_every_turn_with_tools_is_drawn_from_q_star(pair: TinyPair, tmp_path: Path) -> None:
    trainer = run(pair, tmp_path, tools=[add, divide], reward_funcs=lengths)
    turns = check(trainer, pair, lambda row: row["t_prompt"], [add, divide])
    assert sum(len(row) > 2 for row in turns) > 1, "the test needs rows of several turns"
    assert any(len(row) == 1 for row in turns), "and such that call nothing"
    said = [message for row in trainer.messages for message in row]
    results = {message["content"] for message in said if message["role"] == "tool"}
    assert {"5", "4.0"} <= results and any("division by zero" in text for text in results)
    assert any(len(message.get("tool_calls") or ()) == 2 for message in said)
    for log, (inputs, batch, _, _) in zip(trainer.state.log_history, trainer.seen, strict=False):
        drawn = np.concatenate([row["alpha"] for row in inputs])
        assert np.isnan(drawn).any()
        assert log["sampling/alpha/mean"] == pytest.approx(np.nanmean(drawn), abs=1e-6)
        assert log["sampling/alpha/min"] == pytest.approx(np.nanmin(drawn), abs=1e-6)
        ratio = batch["importance_sampling_ratio"][(batch["completion_mask"] * batch["tool_mask"]).bool()]
        assert log["sampling/importance_sampling_ratio/mean"] == pytest.approx(float(ratio.mean()), abs=1e-5)
        assert 0 < log["sampling/policy_drift/max"] < 5e-3 and log["sampling/policy_check"] < 1e-3
        assert 0 < log["tools/failure_frequency"] < 1 and math.isfinite(log["loss"])
        assert all(row["weight_version"] == log["step"] - 1 for row in inputs)
        kept = pq.read_table(tmp_path / f"rollouts/rollouts_{log['step']:05d}.parquet").to_pylist()
        for row, given in zip(kept, inputs, strict=True):  # of a report, the same numbers, NaN at the results of tools
            assert len(row["generated_tokens"]) == len(given["alpha"])
            np.testing.assert_array_equal(row["alpha_history"], np.float32(given["alpha"]))
            np.testing.assert_array_equal(np.isnan(row["kl_theta"]), np.isnan(given["alpha"]))


def test_the_trainer_of_the_document(pair: TinyPair, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []

    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: the first
            b: the second
        """
        calls.append((a, b))
        return a + b

    options = {"max_completion_length": LENGTH, "max_steps": 1, "per_device_train_batch_size": 8}
    trainer = run_snippet(
        snippet("docs/training.md", "tools=[multiply]"),
        DualGRPOTrainer=DualGRPOTrainer,
        model=str(pair.theta_model),
        multiply=add,
        reward=lengths,
        args=grpo_config(tmp_path, **options),
        dataset=Dataset.from_list(rows()),
        config=dual_config(pair),
    )["trainer"]
    with trainer.rollout:
        trainer.train()
    assert calls and trainer.state.global_step == 1


def test_two_processes_go_through_their_own_turns(pair: TinyPair, tmp_path: Path) -> None:
    """Each checks every number of its rows, see `tests/tools_of_two_processes.py`."""
    where = (pair.theta_model, pair.t_model, pair.theta_url, pair.t_url, tmp_path)
    finish(start(two_processes_of("tests.tools_of_two_processes", *map(str, where)), tmp_path))
    first, second = (json.loads((tmp_path / f"found-{process}.json").read_text()) for process in (0, 1))
    assert len(first["rows"]) == len(second["rows"]) == 2 * 8
    assert first["turns"] != second["turns"] and min(max(first["turns"]), max(second["turns"])) > 1


def test_distillation_with_tools(pair: TinyPair, tmp_path: Path) -> None:
    trainer = ObservedDistillation(
        model=str(pair.theta_model),
        teacher_model=AutoModelForCausalLM.from_pretrained(pair.t_model),
        args=distillation_config(
            tmp_path, max_steps=1, per_device_train_batch_size=8, max_completion_length=LENGTH, shuffle_dataset=False
        ),
        train_dataset=Dataset.from_list(rows() * 2),
        dual_config=dual_config(pair),
        tools=[add, divide],
    )
    with trainer.rollout:
        trainer.train()
    assert any(len(row) > 1 for row in check(trainer, pair, lambda row: row["t_prompt"], [add, divide]))
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_environments(pair: TinyPair, tmp_path: Path) -> None:
    """Both sides see the first observation; one environment is over before the others."""
    batch = {"per_device_train_batch_size": 16, "num_generations": 4}
    trainer = run(pair, tmp_path, environment_factory=School, grpo={"max_steps": 1, **batch})

    def t_prompt(row: dict[str, Any]) -> Any:
        shown = row["t_prompt"]
        return shown and [{**shown[0], "content": f"{shown[0]['content']} in {row['number']}"}]

    turns = check(trainer, pair, t_prompt, [School().add])
    texts = trainer.processing_class.batch_decode(trainer.seen[0][1]["prompt_ids"])
    assert all(f" in {row['number']}" in text for row, text in zip(trainer.seen[0][0], texts, strict=True))
    assert len({len(row) for row in turns}) > 1
    said = [message["content"] for row in trainer.messages for message in row if message["role"] == "tool"]
    assert "5" in said and str({"error": "over"}) in said


@pytest.mark.parametrize(
    "given", [{"tools": [add, divide]}, {"environment_factory": School}], ids=["tools", "environment"]
)
def test_the_asynchronous_worker_draws_every_turn_from_q_star(pair: TinyPair, given: dict[str, Any]) -> None:
    """TRL's asynchronous trainer renders the whole conversation anew for each turn."""
    dataset = rows()
    for row in dataset:  # by which samples are told apart
        row["prompt"][0]["content"] += f" {row['number']}"
    with DualRollout(dual_config(pair)) as rollout:  # other tests have trained
        rollout.reload_policy_weights(str(pair.theta_model))
    tokenizer = tool_tokenizer(CALLS)
    loop = make_loop(
        dual_config=dual_config(pair),
        dataset=Dataset.from_list(dataset),
        reward_funcs=[] if "environment_factory" in given else [lengths],
        processing_class=tokenizer,
        eos_token_ids=[tokenizer.eos_token_id],
        num_generations=2,
        max_tokens=24,
        max_tool_calling_iterations=2,
        **given,
    )
    samples = samples_of(loop, 16)
    theta, t = (AutoModelForCausalLM.from_pretrained(folder) for folder in (pair.theta_model, pair.t_model))
    observed = "environment_factory" in given
    options = {"tools": given.get("tools", [School().add]), "add_generation_prompt": True, "return_dict": False}

    def rendered(messages: Any, row: dict[str, Any]) -> list[int]:
        shown = [messages[0] | {"content": messages[0]["content"] + f" in {row['number']}" * observed}]
        return tokenizer.apply_chat_template(shown, **options)

    prompts = [rendered(row["prompt"], row) for row in dataset]
    turns, seen = [], set()
    for sample in samples:
        ids, drawn = sample.input_ids.tolist(), sample.completion_mask.astype(bool)
        ((row, prompt),) = [
            (row, prompt) for row, prompt in zip(dataset, prompts, strict=True) if ids[: len(prompt)] == prompt
        ]
        t_prompt = prompt if row["t_prompt"] is None else rendered(row["t_prompt"], row)
        batch = {"completion_ids": torch.tensor([ids[len(prompt) :]])}
        p, p_t = (distributions(*side, batch)[0].numpy() for side in ((theta, [prompt]), (t, [t_prompt])))
        q = compute_q_star(p, p_t, solve_kl_symmetry(p, p_t))
        expected = np.log(q[np.arange(len(q)), ids[len(prompt) :]])
        own = drawn[len(prompt) :]
        np.testing.assert_allclose(sample.old_log_probs[drawn], expected[own], atol=5e-3)
        turns.append(sum(1 for key, _ in itertools.groupby(own) if key))
        seen.add(row["t_prompt"] is None)
    assert seen == {True, False} and max(turns) > 1, "the test needs rows of several turns"


def test_a_rollout_function_of_ones_own_masks_what_it_did_not_draw(pair: TinyPair, tmp_path: Path) -> None:
    added = [5, 6, 7]

    def turns(prompts: Any, trainer: Any) -> dict[str, Any]:
        rollout = trainer.rollout(prompts, trainer)
        drawn = [len(ids) for ids in rollout["completion_ids"]]
        for name, rows in rollout.items():
            if name not in ("prompt_ids", "weight_version"):
                rollout[name] = [row + (added if name == "completion_ids" else [math.nan] * 3) for row in rows]
        return {**rollout, "env_mask": [[1] * n + [0] * 3 for n in drawn]}

    trainer = run(pair, tmp_path, rollout_func=turns, reward_funcs=lengths, grpo={"max_steps": 1})
    check(trainer, pair, lambda row: row["t_prompt"], [])
    assert math.isfinite(trainer.state.log_history[0]["loss"])

    def bare(prompts: Any, trainer: Any) -> dict[str, Any]:
        rollout = turns(prompts, trainer)
        return {name: rollout[name] for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")}

    with pytest.raises(ValueError, match="rollout_func must return alpha"):
        run(pair, tmp_path, rollout_func=bare, reward_funcs=lengths, grpo={"max_steps": 1})
    with pytest.raises(ValueError, match="leave rollout_func out"):
        run(pair, tmp_path, rollout_func=turns, tools=[add], reward_funcs=lengths)


def test_a_tool_that_returns_an_image_is_refused() -> None:
    with pytest.raises(ValueError, match="returned an image"):
        DualGRPOTrainer.__new__(DualGRPOTrainer)._generate_single_turn([[1]], [["a picture"]], {}, 1)


def test_a_target_goes_on_from_its_own_prompt() -> None:
    assert same_turns([1, 2, 9], [5, 9], [1, 2, 9, 3, 4]) == [5, 9, 3, 4]
    # "9 8" before an answer to come, "9" before one that was given
    assert same_turns([1, 2, 9, 8], [5, 9, 8], [1, 2, 9, 3, 4]) == [5, 9, 3, 4]
    with pytest.raises(ValueError, match="rewrites the first prompt"):
        same_turns([1, 2, 9, 8], [5, 9, 7], [1, 2, 9, 3, 4])


def test_observations_reach_the_target() -> None:
    prompt = [{"role": "user", "content": "go"}]
    text = [{"role": "user", "content": "go north"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "go"}, {"type": "text", "text": " north"}]}]
    hint = [{"role": "system", "content": "cheat"}, {"role": "user", "content": "go"}]
    for shown in (text, parts):
        found = TargetContexts([None, hint]).with_observations([prompt, prompt], [shown, shown]).t_prompts
        assert found == [None, [hint[0], {"role": "user", "content": "go north"}]]
    assert TargetContexts([hint]).with_observations([None], [text]).t_prompts[0][1]["content"] == "gogo north"
    assert TargetContexts([hint]).with_observations([prompt], [prompt]).t_prompts == [hint]
    assert TargetContexts().with_observations([prompt], [text]).t_prompts is None


def test_rows_that_wait_for_a_turn() -> None:
    tool, answer = {"role": "tool"}, {"role": "assistant"}
    messages = [[answer], [answer, tool], [answer, tool], [answer, tool, answer]]
    assert rows_with_results(messages, [[1], [1], [1] * 8, [1]], 8) == [1], "the third has no room for another turn"


def test_a_turn_has_what_the_completion_has_left() -> None:
    """Of 8 tokens the first row has spent 3; the second's result has used up the last, so that it is asked nothing."""

    class Session:
        def draw(self, prompts: Any, contexts: TargetContexts, max_tokens: Any = None) -> list[GenerationOutput]:
            self.asked = prompts, contexts.t_prompts, max_tokens
            return [GenerationOutput(ids, ids, SequenceRecord(token_ids=[7])) for ids in prompts]

    session: Any = Session()
    turns = Turns(session, [[1, 2], [3]], TargetContexts([[4], None]), 8)
    turns.first()
    records = turns.following([0, 1], [[1, 2, 7, 5, 5], [3, 7, 5, 5, 5, 5, 5, 5, 5]])
    assert session.asked == ([[1, 2, 7, 5, 5]], [[4, 7, 5, 5]], [5])
    assert [record.token_ids for record in records] == [[7], []]
