"""Is the corrected policy gradient that of the policy? TRL's real loss on rollouts from q*, against enumeration.

The policy is a Llama without layers, whose next token depends on the last one alone, so that both servers can be
Markov chains with known distributions and all completions can be enumerated. The learning rate is 0: every step draws a
new batch from the same q* and gives one independent gradient, whose mean has an expectation that is known exactly.

That expectation is the on-policy gradient when the weights multiply whole sequences ("sequence" modes, here without a
bound that acts) or when a completion has one token. Weights per token, the default, are the usual approximation for
longer ones: they leave out how q* chose the other tokens of the completion.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from dual_rollout import CoordinatorConfig, DualGRPOTrainer
from dual_rollout.training.event_loop import LoopThread
from dual_rollout.training.weight_sync import TrlWeightSync
from tests.integration.test_training import grpo_config
from tests.markov_server import MarkovServer, random_chain

V, END = 6, 0
GENERATIONS, BATCH, STEPS = 8, 64, 150
# A t statistic with 149 degrees of freedom lies beyond ±5.5 with probability 1.6e-7. With 36 parameters, all four
# equalities of this file together raise a false alarm with probability below 3e-5. The seeds are fixed.
LIMIT = 5.5


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(V)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END}", pad_token=f"w{END}")


def bigram_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": V, "intermediate_size": 1, "num_attention_heads": 1, "num_hidden_layers": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=V, eos_token_id=END, pad_token_id=END, bos_token_id=None, **shape))
    torch.nn.init.normal_(model.lm_head.weight, std=0.6)
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    return model


def transitions(model: LlamaForCausalLM) -> torch.Tensor:
    """`(V, V)`: the distribution of the next token after each token."""
    return model(torch.arange(V)[:, None]).logits[:, -1].softmax(-1)


def completions(length: int) -> list[tuple[int, ...]]:
    """All that can be generated: up to `length` tokens, ending with the first `END`."""
    return [
        words
        for size in range(1, length + 1)
        for words in itertools.product(range(V), repeat=size)
        if END not in words[:-1] and (size == length or words[-1] == END)
    ]


def reward_of(words: tuple[int, ...]) -> float:
    return float(np.random.default_rng([9, *words]).normal())


def reward(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [reward_of(tuple(ids)) for ids in completion_ids]


def exact_gradient(model: LlamaForCausalLM, prompts: list[int], length: int) -> np.ndarray:
    """The expectation of TRL's dr_grpo gradient with unscaled rewards, on-policy, in the output layer.

    Of the group's mean, which TRL subtracts, a sequence's own reward is a share 1/G, hence the factor 1 − 1/G.
    """
    log_p = transitions(model).log()
    value = torch.tensor(0.0)
    for prompt in prompts:
        for words in completions(length):
            logps = [log_p[a, b] for a, b in itertools.pairwise((prompt, *words))]
            value = value + torch.stack(logps).sum().exp() * reward_of(words) / len(prompts)
    loss = -(1 - 1 / GENERATIONS) * value / length
    (gradient,) = torch.autograd.grad(loss, [model.lm_head.weight])
    return gradient.numpy()


class GradientKeeper(DualGRPOTrainer):
    """Keeps the output layer's gradient of every step."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.gradients: list[np.ndarray] = []
        self._weight_sync = TrlWeightSync()  # nothing to send: the learning rate is 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        self.gradients.append(self.model.lm_head.weight.grad.numpy().copy())
        return loss


@pytest.fixture(scope="module")
def urls() -> Iterator[tuple[str, str]]:
    """The policy's chain and an unrelated one."""
    with torch.no_grad():
        theta = transitions(bigram_model()).double().numpy()
    theta /= theta.sum(axis=1, keepdims=True)
    loop = LoopThread()
    running = [MarkovServer(chain).running() for chain in (theta, random_chain(np.random.default_rng(5), V, 1.0))]
    servers = [loop.run(server.__aenter__()) for server in running]
    try:
        yield servers[0].url, servers[1].url
    finally:
        for server in running:
            loop.run(server.__aexit__(None, None, None))
        loop.close()


def z_scores(folder: Path, urls: tuple[str, str], length: int, mode: str, **distribution: Any) -> np.ndarray:
    """(mean gradient − on-policy gradient) / standard error, `(V, V)`."""
    model, prompts = bigram_model(), [1, 2, 3, 4]
    expected = exact_gradient(model, prompts, length)
    trainer = GradientKeeper(
        model=model,
        processing_class=tokenizer(),
        reward_funcs=reward,
        args=grpo_config(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            num_generations=GENERATIONS,
            max_completion_length=length,
            learning_rate=0.0,
            max_grad_norm=0.0,
            loss_type="dr_grpo",
            scale_rewards="none",
            logging_steps=STEPS,
        ),
        # All prompts equally often in every batch.
        train_dataset=Dataset.from_list([{"prompt": [prompts[i % 4]]} for i in range(BATCH // GENERATIONS)]),
        dual_config=CoordinatorConfig(
            theta_url=urls[0],
            t_url=urls[1],
            top_k=V,
            seed=11,
            decoding="lockstep",
            max_concurrency=BATCH,
            **distribution,
        ),
        importance_sampling_mode=mode,
        importance_sampling_clip_max=1e6,
    )
    with trainer.rollout:
        trainer.train()
    gradients = np.stack(trainer.gradients)
    assert gradients.shape == (STEPS, V, V)
    error = gradients.std(axis=0, ddof=1) / np.sqrt(STEPS)
    scores = (gradients.mean(axis=0) - expected) / error
    print(f"|gradient| <= {np.abs(expected).max():.3f}, error <= {error.max():.4f}, |z| <= {np.abs(scores).max():.1f}")
    return scores


@pytest.mark.parametrize(("length", "mode"), [(1, "token_truncate"), (3, "sequence_truncate")])
def test_the_corrected_gradient_is_the_on_policy_gradient(
    tmp_path: Path, urls: tuple[str, str], length: int, mode: str
) -> None:
    assert np.abs(z_scores(tmp_path, urls, length, mode)).max() < LIMIT


def test_weights_per_token_are_an_approximation_better_than_none(tmp_path: Path, urls: tuple[str, str]) -> None:
    """Of three tokens, with an unrelated target: biased, as docs/mathematics.md says, yet less than without weights."""
    per_token, without = (np.abs(z_scores(tmp_path / mode, urls, 3, mode)).max() for mode in ("token_truncate", "none"))
    assert LIMIT < per_token < without and without > 3 * LIMIT


def test_the_uncorrected_gradient_is_not(tmp_path: Path, urls: tuple[str, str]) -> None:
    assert np.abs(z_scores(tmp_path, urls, 1, "none")).max() > 3 * LIMIT


@pytest.mark.parametrize("length", [1, 3])
def test_rollouts_from_the_policy_itself_need_no_correction(tmp_path: Path, urls: tuple[str, str], length: int) -> None:
    """The measure of this file: α = 0 is plain on-policy training."""
    scores = z_scores(tmp_path, urls, length, "none", alpha_method="fixed", fixed_alpha=0.0)
    assert np.abs(scores).max() < LIMIT
