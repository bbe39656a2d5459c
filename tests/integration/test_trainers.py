"""Trainers and the situations they work in: do the right weights reach the right rows of every loss?

Every run is observed at two places: where a rollout has been scored (with a plain forward of the trainer's model at
that very moment, which is what log π_θ of the weights must be), and where a loss is given its micro-batch, after TRL
has shuffled, split and reused the rollout. The datasets have a `t_prompt` of their own in every row.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import RLOOConfig

from dual_rollout import (
    CoordinatorConfig,
    DualGRPOTrainer,
    DualRLOOTrainer,
)
from dual_rollout.training.weight_sync import TrlWeightSync
from tests.integration.conftest import TinyPair
from tests.integration.test_gradient import LIMIT, bigram_model, completions, reward, reward_of, tokenizer, transitions
from tests.integration.test_gradient import urls as chain_urls  # noqa: F401 (a fixture)
from tests.integration.test_training import count_of_the, dual_config, grpo_config, policy_logprobs
from tests.synced_training import lora_config

CLIP = 1.3
QUESTIONS = ["what is that", "the user of what", "and to the", "system in user", "that is in", "assistant and user"]
QUESTIONS += ["to the user", "is that it"]


@dataclass
class Rollout:
    """One call of `_generate_and_score_completions`; `policy` is `(B, T)`, by a plain forward."""

    rows: list[dict[str, Any]]
    batch: dict[str, Any]
    policy: torch.Tensor
    mode: str
    step: int


class Observed:
    """Keeps rollouts and, as pairs of the rollout's index and the micro-batch, what losses were given."""

    def __init__(self, *args: Any, **kwargs: Any):
        self.rollouts: list[Rollout] = []
        self.losses: list[tuple[int, dict[str, Any]]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode, step = "train" if self.model.training else "eval", self.state.global_step
        output = super()._generate_and_score_completions(inputs)
        self.rollouts.append(Rollout(inputs, _copy(output), policy_logprobs(self.model, output), mode, step))
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self.losses.append((len(self.rollouts) - 1, _copy(inputs)))
        return super()._compute_loss(model, inputs)


class ObservedGRPO(Observed, DualGRPOTrainer):
    pass


class ObservedRLOO(Observed, DualRLOOTrainer):
    pass


def _copy(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}


def rows(strings: bool = False) -> list[dict[str, Any]]:
    def prompt(text: str) -> Any:
        return text if strings else [{"role": "user", "content": text}]

    return [
        {"prompt": prompt(question), "t_prompt": prompt(f"{question} {number}"), "number": number}
        for number, question in enumerate(QUESTIONS)
    ]


def rloo_config(folder: Path, **options: Any) -> RLOOConfig:
    grpo = grpo_config(folder)
    shared = (
        "per_device_train_batch_size",
        "num_generations",
        "max_completion_length",
        "logging_steps",
        "disable_tqdm",
    )
    plain = {"report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    plain |= {name: getattr(grpo, name) for name in shared} | {"save_strategy": "no", "learning_rate": 1e-2}
    return RLOOConfig(output_dir=str(folder), **{**plain, **options})


def run(
    pair: TinyPair, folder: Path, kind: type = ObservedGRPO, *, dataset: Any = None, config: Any = None, **options: Any
) -> Any:
    """A finished run of three steps. Options are the trainer's (by name) and else the training config's."""
    names = ("reward_funcs", "peft_config", "eval_dataset", "importance_sampling_mode", "importance_sampling_clip_max")
    arguments = {"reward_funcs": count_of_the, "importance_sampling_clip_max": CLIP}
    arguments |= {name: options.pop(name) for name in names if name in options}
    configure = rloo_config if issubclass(kind, DualRLOOTrainer) else grpo_config
    trainer = kind(
        model=str(pair.theta_model),
        args=configure(folder, **{"max_steps": 3, **options}),
        train_dataset=Dataset.from_list(rows()) if dataset is None else dataset,
        dual_config=dual_config(pair) if config is None else config,
        **arguments,
    )
    with trainer.rollout:
        trainer.train()
    return trainer


def check(trainer: Any, pair: TinyPair) -> None:
    """Every loss was given the weights of its own rows, from the policy's weights at the time of their rollout."""
    assert trainer.losses
    cut = 0
    for index, inputs in trainer.losses:
        rollout = trainer.rollouts[index]
        places = {row_key(rollout.batch, j): j for j in range(len(rollout.rows))}
        for i in range(len(inputs["completion_ids"])):
            j = places[row_key(inputs, i)]
            real = rollout.batch["completion_mask"][j].bool()
            log_q = torch.tensor(rollout.rows[j]["logprobs_q"]).float()[: real.sum()]
            weights = (rollout.policy[j][real] - log_q).exp()
            cut += int((weights > CLIP).sum())
            ratio = inputs["importance_sampling_ratio"][i]
            torch.testing.assert_close(ratio[real], weights.clamp(max=CLIP), atol=5e-3, rtol=5e-3)
            assert (ratio[~real] == 1).all()
            for name in ("alpha", "logprobs_theta", "logprobs_t", "sampling_per_token_logps"):
                same = {"rtol": 0, "atol": 0, "equal_nan": True}  # log π_t is NaN where there is no target
                torch.testing.assert_close(inputs[name][i], rollout.batch[name][j], **same)
            if inputs["advantages"].dim() == 2:  # GRPO: one advantage per row, times a weight per token
                base = inputs["advantages"][i] / ratio
                torch.testing.assert_close(base, base[:1].expand_as(base), atol=1e-4, rtol=1e-4)
    assert cut, "the test needs weights that the bound cuts"
    check_target(trainer, pair)
    drift = [entry.get("sampling/policy_drift/max", 0.0) for entry in trainer.state.log_history]
    assert 0 < max(drift) < 5e-3, "the server had the trainer's weights at every rollout"
    assert [row["weight_version"] for r in trainer.rollouts for row in r.rows] == [
        r.step for r in trainer.rollouts for _ in r.rows
    ]


def check_target(trainer: Any, pair: TinyPair) -> None:
    """π_t saw each row's own `t_prompt`, seen in its log-probabilities."""
    model = AutoModelForCausalLM.from_pretrained(pair.t_model)
    trained = [rollout for rollout in trainer.rollouts if rollout.mode == "train"]
    shown = [(rollout, row, j) for rollout in trained[:2] for j, row in enumerate(rollout.rows)]
    for rollout, row, j in shown:
        prompt = row["t_prompt"]
        if isinstance(prompt, str):
            prompt = trainer.processing_class(prompt)["input_ids"]
        else:
            options = {"add_generation_prompt": True, "return_dict": True}
            prompt = trainer.processing_class.apply_chat_template(prompt, **options)["input_ids"]
        ids = torch.tensor([*prompt, *rollout.batch["completion_ids"][j, : len(row["logprobs_t"])]])
        with torch.no_grad():
            logprobs = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(row["logprobs_t"]).float(), expected, atol=1e-3, rtol=0)


def row_key(batch: dict[str, Any], i: int) -> tuple[int, ...]:
    """Of a row's tokens; masked completions count as well."""
    prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
    return (*prompt.tolist(), -1, *batch["completion_ids"][i].tolist())


SITUATIONS: dict[str, dict[str, Any]] = {
    "one step per rollout": {},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "steps_per_generation": {"steps_per_generation": 2},
    "num_iterations": {"num_iterations": 2},
    "all three": {"gradient_accumulation_steps": 2, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 5},
    "a rollout between two updates": {"gradient_accumulation_steps": 2, "steps_per_generation": 3, "max_steps": 4},
    "beta": {"beta": 0.1},
    "beta with num_iterations": {"beta": 0.1, "num_iterations": 2, "use_bias_correction_kl": True},
    "scale_rewards batch": {"scale_rewards": "batch"},
    "scale_rewards none": {"scale_rewards": "none"},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "top_entropy_quantile": {"top_entropy_quantile": 0.3},
    "importance_sampling_level": {"importance_sampling_level": "sequence", "num_iterations": 2},
    "two-sided clipping": {"delta": 4.0, "num_iterations": 2},
    "dataloader workers": {"dataloader_num_workers": 2},
    "printed completions": {"log_completions": True, "num_completions_to_print": 1},
    "padding": {"pad_to_multiple_of": 8},
    "remove_unused_columns": {"remove_unused_columns": True},
    "mask_truncated_completions": {"mask_truncated_completions": True, "max_completion_length": 60},
    "no shuffling": {"shuffle_dataset": False},
    "entropy bonus": {"entropy_coef": 0.01},
    "a reference model that follows": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_grpo(tiny_pair: TinyPair, tmp_path: Path, situation: str) -> None:
    options = SITUATIONS[situation]
    trainer = run(tiny_pair, tmp_path, **options)
    check(trainer, tiny_pair)
    old = any("old_per_token_logps" in inputs for _, inputs in trainer.losses)
    reused = {"steps_per_generation", "num_iterations"} & set(options)
    assert old == bool(reused), "TRL computes log π_θ before the update where a rollout serves several updates"
    steps = options.get("steps_per_generation", options.get("gradient_accumulation_steps", 1))
    rollouts = len(trainer.losses) / (steps * options.get("num_iterations", 1))
    assert len(trainer.rollouts) == math.ceil(rollouts), "one rollout serves that many losses"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"steps_per_generation": 2, "num_iterations": 2},
        {"beta": 0.0, "normalize_advantages": True},
        {"mask_truncated_completions": True, "max_completion_length": 60},
        {"log_completions": True, "gradient_checkpointing": True},
    ],
    ids=["beta", "accumulation", "reuse", "normalize", "mask_truncated", "logged"],
)
def test_rloo(tiny_pair: TinyPair, tmp_path: Path, options: dict[str, Any]) -> None:
    check(run(tiny_pair, tmp_path, ObservedRLOO, **options), tiny_pair)


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_prompts_that_are_strings(tiny_pair: TinyPair, tmp_path: Path, kind: type) -> None:
    def length(completions: list[str], **_: Any) -> list[float]:
        return [float(len(text)) for text in completions]

    check(run(tiny_pair, tmp_path, kind, dataset=Dataset.from_list(rows(True)), reward_funcs=length), tiny_pair)


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_adapters(tiny_pair: TinyPair, tmp_path: Path, kind: type) -> None:
    """The server without LoRA gets merged weights; `check` sees that it has those of the adapter."""
    options = {"learning_rate": 3e-2, "peft_config": lora_config(), "beta": 0.05}
    trainer = run(tiny_pair, tmp_path, kind, **options)
    check(trainer, tiny_pair)
    moved = [p.detach().abs().max() for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert max(moved) > 0.01, "the adapter was trained"


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_rewards(tiny_pair: TinyPair, tmp_path: Path, kind: type) -> None:
    """Several functions with weights, some without an answer; all see the dataset's columns and the rollout's."""
    seen: list[dict[str, Any]] = []

    def first(completions: list[Any], number: list[int], **columns: Any) -> list[float | None]:
        seen.append(columns)
        return [None if n % 2 else float(n) + len(c[0]["content"]) for n, c in zip(number, completions, strict=True)]

    def second(completions: list[Any], **_: Any) -> list[float | None]:
        return [None] * len(completions)

    functions = {"reward_funcs": [first, second, count_of_the], "reward_weights": [1.0, 2.0, 0.5]}
    trainer = run(tiny_pair, tmp_path, kind, **functions)
    check(trainer, tiny_pair)
    for columns, rollout in zip(seen, trainer.rollouts, strict=True):
        for name in ("alpha", "importance_weights", "logprobs_theta", "logprobs_t", "logprobs_q", "weight_version"):
            assert columns[name] == [row[name] for row in rollout.rows]


def test_a_streamed_dataset(tiny_pair: TinyPair, tmp_path: Path) -> None:
    check(run(tiny_pair, tmp_path, dataset=IterableDataset.from_generator(rows)), tiny_pair)


@pytest.mark.parametrize("kind", [ObservedGRPO, ObservedRLOO])
def test_evaluation_has_current_weights_and_changes_nothing(tiny_pair: TinyPair, tmp_path: Path, kind: type) -> None:
    held_out = Dataset.from_list(rows()[:2])
    evaluated = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4, "eval_on_start": True}
    trainer = run(tiny_pair, tmp_path / "a", kind, eval_dataset=held_out, **evaluated)
    check(trainer, tiny_pair)
    assert [(r.mode, r.step) for r in trainer.rollouts] == [
        (mode, step) for step in range(4) for mode in ("eval", "train") if (mode, step) != ("train", 3)
    ]
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["eval_sampling/alpha/max"] for entry in evaluations] == [0.0] * 4
    for rollout in (r for r in trainer.rollouts if r.mode == "eval"):  # of the policy, not of q*
        real = rollout.batch["completion_mask"].bool()
        for name in ("sampling_per_token_logps", "logprobs_theta"):
            torch.testing.assert_close(rollout.batch[name][real], rollout.policy[real], atol=1e-3, rtol=0)
        assert (rollout.batch["alpha"] == 0).all() and (rollout.batch["importance_weights"][real] == 1).all()
        assert rollout.batch["logprobs_t"][real].isnan().all()
    alone = run(tiny_pair, tmp_path / "b", kind)
    trained = [r for r in trainer.rollouts if r.mode == "train"]
    for with_evaluation, without in zip(trained, alone.rollouts, strict=True):
        assert torch.equal(with_evaluation.batch["completion_ids"], without.batch["completion_ids"])
    # The server's sums depend on what it has in its batch, and Adam makes a step of any gradient, however small.
    for weight, other in zip(trainer.model.parameters(), alone.model.parameters(), strict=True):
        assert (weight - other).abs().mean() < 1e-4


def test_truncated_completions_that_are_masked_have_no_effect(tiny_pair: TinyPair, tmp_path: Path) -> None:
    options = {"mask_truncated_completions": True, "max_completion_length": 60, "per_device_train_batch_size": 12}
    for kind in (ObservedGRPO, ObservedRLOO):
        trainer = run(tiny_pair, tmp_path, kind, max_steps=1, learning_rate=0.0, beta=0.0, **options)
        (_, batch), truncated = trainer.losses[0], trainer.losses[0][1]["completion_mask"].sum(dim=1) == 0
        assert 0 < truncated.sum() < len(truncated), "the test needs completions of both kinds"
        other = _copy(batch)
        other["advantages"][truncated] = 1e3
        other["completion_ids"][truncated] = 5
        gradients = [loss_gradient(trainer, inputs) for inputs in (batch, other)]
        assert gradients[0].abs().max() > 0
        torch.testing.assert_close(*gradients)


def loss_gradient(trainer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, inputs).backward()
    return trainer.model.lm_head.weight.grad.clone()


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "none"])
def test_rloo_weights_by_hand(tiny_pair: TinyPair, tmp_path: Path, mode: str) -> None:
    """The gradient of −mean_b A_b·ρ_b·Σ_t w_bt·log π(y_bt), A and w by hand, at a policy that has moved a little."""
    options = {"importance_sampling_mode": mode, "beta": 0.0, "learning_rate": 0.0, "max_steps": 1, "epsilon": 10.0}
    trainer = run(tiny_pair, tmp_path, ObservedRLOO, **options)
    rollout, (_, batch) = trainer.rollouts[0], trainer.losses[0]
    mask = batch["completion_mask"]
    order = [row_key(rollout.batch, j) for j in range(len(mask))]
    order = [order.index(row_key(batch, i)) for i in range(len(mask))]
    log_q = [torch.tensor(row["logprobs_q"]).sum() for row in rollout.rows]
    assert len({float(value) for value in log_q}) == len(log_q)
    texts = trainer.processing_class.batch_decode(rollout.batch["completion_ids"], skip_special_tokens=True)
    rewards = torch.tensor(count_of_the([[{"content": text}] for text in texts])).view(-1, 2)
    advantages = (rewards - rewards.flip(1)).flatten()[order]  # of two, each is the other's baseline
    assert advantages.abs().max() > 0

    log_w = (rollout.policy - rollout.batch["sampling_per_token_logps"])[order] * mask
    if mode == "sequence_truncate":
        weights = log_w.sum(dim=1, keepdim=True).exp().clamp(max=CLIP)
    elif mode == "token_mask":
        weights = torch.where(log_w.exp() > CLIP, 0.0, log_w.exp())
    else:
        weights = log_w.exp().clamp(max=CLIP) if mode == "token_truncate" else torch.ones_like(log_w)

    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        head = trainer.model.lm_head.weight
        head += 0.05 * torch.randn(head.shape, generator=generator)
    actual = loss_gradient(trainer, batch)
    trainer.model.zero_grad()
    logps = grad_logprobs(trainer.model, batch)
    ratio = ((logps.detach() - rollout.policy[order]) * mask).sum(dim=1).exp()
    assert (ratio - 1).abs().max() > 0.05, "the policy has moved"
    (-(advantages * ratio * (weights * logps * mask).sum(dim=1)).mean()).backward()
    expected = trainer.model.lm_head.weight.grad
    torch.testing.assert_close(actual, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-3)


def grad_logprobs(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """As `policy_logprobs`, with a gradient."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    length = batch["completion_ids"].shape[1]
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
    logprobs = logits[:, -length - 1 : -1].log_softmax(-1)
    return logprobs.gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


class GradientKeeper(DualRLOOTrainer):
    """Keeps the output layer's gradient of every step; the learning rate is 0 and nothing is sent."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gradients: list[np.ndarray] = []
        self._weight_sync = TrlWeightSync()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients.append(self.model.lm_head.weight.grad.numpy().copy())
        return loss


def test_rloo_weighted_per_sequence_has_the_on_policy_gradient(
    tmp_path: Path,
    chain_urls: tuple[str, str],  # noqa: F811
) -> None:
    """Against enumeration, as in `test_gradient`, with its false-alarm rate; without weights it is off by far."""
    model, prompts, length, generations = bigram_model(), [1, 2, 3, 4], 2, 4
    log_p, value = transitions(model).log(), torch.tensor(0.0)
    for words in [(prompt, *words) for prompt in prompts for words in completions(length)]:
        logps = [log_p[a, b] for a, b in itertools.pairwise(words)]
        value = value + torch.stack(logps).sum().exp() * reward_of(words[1:]) / len(prompts)
    (expected,) = torch.autograd.grad(-value, [model.lm_head.weight])

    largest = {}
    for mode in ("sequence_truncate", "none"):
        args = rloo_config(
            tmp_path / mode,
            max_steps=60,
            per_device_train_batch_size=64,
            num_generations=generations,
            max_completion_length=length,
            learning_rate=0.0,
            max_grad_norm=0.0,
            beta=0.0,
            logging_steps=60,
        )
        config = CoordinatorConfig(theta_url=chain_urls[0], t_url=chain_urls[1], top_k=6, seed=11, decoding="lockstep")
        trainer = GradientKeeper(
            model=bigram_model(),
            processing_class=tokenizer(),
            reward_funcs=reward,
            args=args,
            train_dataset=Dataset.from_list([{"prompt": f"w{prompts[i % 4]}"} for i in range(16)]),
            dual_config=config,
            importance_sampling_mode=mode,
            importance_sampling_clip_max=1e6,
        )
        with trainer.rollout:
            trainer.train()
        gradients = np.stack(trainer.gradients)
        error = gradients.std(axis=0, ddof=1) / np.sqrt(len(gradients))
        largest[mode] = np.abs((gradients.mean(axis=0) - expected.numpy()) / error).max()
    assert largest["sequence_truncate"] < LIMIT < 2 * LIMIT < largest["none"]


EVERY_THIRD = list(range(0, 256, 3))


@pytest.mark.parametrize("trainer_class", [ObservedGRPO, ObservedRLOO])
@pytest.mark.parametrize("knows", ["the trainer", "the folder"])
def test_completions_end_where_the_trainer_says(
    tiny_pair: TinyPair, tmp_path: Path, trainer_class: type[Observed], knows: str
) -> None:
    """At the ids that TRL counts as an end, and at no other that the tokenizer's folder names."""
    model = AutoModelForCausalLM.from_pretrained(tiny_pair.theta_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_pair.theta_model)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    if knows == "the trainer":
        model.generation_config.eos_token_id = EVERY_THIRD
    else:
        (tmp_path / "tokenizer" / "generation_config.json").write_text(json.dumps({"eos_token_id": EVERY_THIRD}))
    make_args = grpo_config if trainer_class is ObservedGRPO else rloo_config
    trainer = trainer_class(
        model=model,
        processing_class=AutoTokenizer.from_pretrained(tmp_path / "tokenizer"),
        reward_funcs=count_of_the,
        args=make_args(tmp_path / "run", max_steps=1, max_completion_length=12),
        train_dataset=Dataset.from_list(rows()),
        dual_config=dual_config(tiny_pair),
    )
    with trainer.rollout:
        trainer.train()
    ends, batch = set(trainer.eos_token_ids), trainer.rollouts[0].batch
    drawn = [
        ids[mask.bool()].tolist() for ids, mask in zip(batch["completion_ids"], batch["completion_mask"], strict=True)
    ]
    for tokens in drawn:
        assert ends.isdisjoint(tokens[:-1]) and (tokens[-1] in ends or len(tokens) == 12)
    if knows == "the trainer":
        assert {tokens[-1] for tokens in drawn} & set(EVERY_THIRD)
    else:
        assert any(set(tokens[:-1]) & set(EVERY_THIRD) for tokens in drawn)
    clipped = sum(tokens[-1] not in ends for tokens in drawn) / len(drawn)
    assert trainer.state.log_history[0]["completions/clipped_ratio"] == pytest.approx(clipped)
