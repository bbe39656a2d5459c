"""A native server of two models on real vLLM: it draws from their q*, whatever the engine does meanwhile."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer

from dual_rollout import CoordinatorConfig, DualGRPOTrainer, DualVLLMCoordinator, GenerationOutput
from dual_rollout.cli import main
from dual_rollout.functional.kl_symmetry import solve_alpha
from tests.chi_square import chi_square_p_value
from tests.documents import subcommands
from tests.integration.test_doctor import report
from tests.integration.test_training import chat_dataset, count_of_the, grpo_config
from tests.tiny_model import make_tiny_model, make_tokenizer, perturbed_copy
from tests.vllm import pairs as of_pairs
from tests.vllm.pairs import Pairs, distributions_of, ragged_prompts
from tests.vllm.servers import REPOSITORY, DocumentedServer, NativeServer, metric, run_in_vllms_python, running
from tests.vllm.trl_transfer import send_by_files

VOCAB_SIZE = len(make_tokenizer())
TOLERANCE = 2e-4  # nats; vLLM's kernels against transformers', both in float32
BLOCKS = 20  # of 32 tokens: room for seven of the sixteen sequences that the server may run
Q_STAR_FOR_ALL = ("--ordinary-requests", "q_star")
SMALL_CACHE = (f"--num-gpu-blocks-override={BLOCKS}", f"--max-logprobs={VOCAB_SIZE}")


@dataclass(frozen=True)
class Native:
    """A native server and its two models."""

    server: NativeServer
    theta: Any
    t: Any

    @property
    def url(self) -> str:
        return self.server.url


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_tiny_qwen3(folder: Path) -> Path:
    """Another architecture than the tiny Llama's, with more layers, other widths and twice the keys and values."""
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(5)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        model.get_input_embeddings().weight.normal_(std=2.0 / config.hidden_size**0.5)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Native, Native]]:
    """All servers of these tests, started side by side: most of a start is imports on one core."""
    folder = tmp_path_factory.mktemp("native")
    theta = make_tiny_model(folder / "theta", hidden_size=128, seed=0)
    t = perturbed_copy(theta, folder / "t", noise=0.2, seed=1)
    nearby = NativeServer(theta, t, settings=Q_STAR_FOR_ALL, flags=SMALL_CACHE, log=folder / "nearby.log")
    theta, t = make_tiny_model(folder / "llama", hidden_size=64), make_tiny_qwen3(folder / "qwen3")
    unlike = DocumentedServer(theta, t, log=folder / "unlike.log")
    with running(nearby, unlike):
        yield tuple(Native(server, load(server.model), load(server.target)) for server in (nearby, unlike))


@pytest.fixture
def native(both_servers: tuple[Native, Native]) -> Native:
    """A nearby pair behind a cache that is too small for the batches of these tests; ordinary requests get q* too."""
    return both_servers[0]


@pytest.fixture
def unlike(both_servers: tuple[Native, Native]) -> Native:
    """Two architectures, depths and sizes of cache entries; ordinary requests get π_θ. Started by a page's command."""
    return both_servers[1]


def generate(native: Native, prompts: Sequence[list[int]], max_tokens: int, **options: Any) -> list[GenerationOutput]:
    t_prompts = options.pop("t_prompts", None)
    config = CoordinatorConfig(engine="native", theta_url=native.url, ignore_eos=True, **options)

    async def run() -> list[GenerationOutput]:
        async with DualVLLMCoordinator(config) as coordinator:
            return await coordinator.generate_batch(
                prompts, t_prompts=t_prompts, max_tokens=max_tokens, return_diagnostics=True
            )

    outputs = asyncio.run(run())
    assert [output.error for output in outputs] == [None] * len(prompts)
    return outputs


def logprobs_of(model: Any, text: Sequence[int], start: int, temperature: float) -> np.ndarray:
    """`(len(text) - start, V)` float64: the distributions of the tokens from `start` on."""
    with torch.no_grad():
        logits = model(torch.tensor([list(text)])).logits[0, start - 1 : -1].double()
    return (logits / temperature).log_softmax(-1).numpy()


def largest_errors(
    native: Native,
    outputs: Sequence[GenerationOutput],
    theta: Any = None,
    temperature: float = 1.0,
    t_prompts: Sequence[list[int]] | None = None,
) -> dict[str, float]:
    """Of every field against transformers over the full vocabulary, at the α that was reported."""
    errors: dict[str, float] = {}

    def note(name: str, served: Sequence[float], expected: np.ndarray) -> None:
        errors[name] = max(errors.get(name, 0.0), float(np.abs(np.array(served) - expected).max()))

    for i, output in enumerate(outputs):
        prompt, tokens = output.prompt_token_ids, output.generated_tokens
        t_prompt = prompt if t_prompts is None else t_prompts[i]
        logp_theta = logprobs_of(theta or native.theta, [*prompt, *tokens], len(prompt), temperature)
        logp_t = logprobs_of(native.t, [*t_prompt, *tokens], len(t_prompt), temperature)
        alpha = np.array(output.alpha_history)[:, None]
        path = (1 - alpha) * logp_theta + alpha * logp_t
        psi = np.log(np.exp(path).sum(1))
        chosen = np.arange(len(path)), output.generated_tokens
        note("log q", output.logprobs_q, (path - psi[:, None])[chosen])
        note("log π_θ", output.logprobs_theta, logp_theta[chosen])
        note("log π_t", output.logprobs_t, logp_t[chosen])
        note("weight", np.log(output.importance_weights).tolist(), (logp_theta - path + psi[:, None])[chosen])
        q = np.exp(path - psi[:, None])
        note("KL(q‖π_θ)", output.diagnostics["kl_theta"], (q * (path - psi[:, None] - logp_theta)).sum(1))
        note("KL(q‖π_t)", output.diagnostics["kl_t"], (q * (path - psi[:, None] - logp_t)).sum(1))
        note("KL difference", np.abs((q * (logp_t - logp_theta)).sum(1)).tolist(), np.zeros(len(q)))
        note("α", output.alpha_history, solve_alpha(logp_theta, logp_t))
    return errors


def assert_right(errors: dict[str, float], balanced: bool = True) -> None:
    assert errors.pop("KL difference") < 1e-4 or not balanced
    assert errors.pop("α") < 1e-3 or not balanced
    assert max(errors.values()) < TOLERANCE, errors


def test_every_field_is_exact_under_batching_and_preemption(native: Native) -> None:
    before = metric(native.server, "num_preemptions_total")
    outputs = generate(native, ragged_prompts(16), max_tokens=60)
    assert metric(native.server, "num_preemptions_total") > before, "the cache was large enough"
    assert sum(len(output.generated_tokens) for output in outputs) == 960
    assert_right(largest_errors(native, outputs))


def test_every_field_is_exact_after_a_prefix_cache_hit(native: Native) -> None:
    prompt = ragged_prompts(1, seed=3)[0] + list(range(100, 180))
    generate(native, [prompt], max_tokens=1)
    before = metric(native.server, "prefix_cache_hits_total")
    outputs = generate(native, [[*prompt, 5], [*prompt, 6, 7]], max_tokens=20)
    assert metric(native.server, "prefix_cache_hits_total") >= before + 2 * 64
    assert_right(largest_errors(native, outputs))


def test_every_side_has_a_prompt_and_a_model_of_its_own(native: Native) -> None:
    """Two requests, each row with the logits of its own side's model."""
    prompts, t_prompts = ragged_prompts(8, seed=11), ragged_prompts(8, seed=12)
    outputs = generate(native, prompts, max_tokens=30, t_prompts=t_prompts)
    assert_right(largest_errors(native, outputs, t_prompts=t_prompts))


def test_unlike_models_at_another_temperature_with_bounds(unlike: Native) -> None:
    outputs = generate(unlike, ragged_prompts(8, seed=1), max_tokens=30, alpha_max=0.3, temperature=0.7)
    alphas = np.concatenate([output.alpha_history for output in outputs])
    assert alphas.max() == pytest.approx(0.3, abs=1e-5) and 0.02 < (alphas < 0.2999).mean() < 0.98
    assert_right(largest_errors(unlike, outputs, temperature=0.7), balanced=False)
    for output in outputs:
        text, start = [*output.prompt_token_ids, *output.generated_tokens], len(output.prompt_token_ids)
        distributions = (logprobs_of(model, text, start, 0.7) for model in (unlike.theta, unlike.t))
        assert output.alpha_history == pytest.approx(np.minimum(solve_alpha(*distributions), 0.3), abs=1e-3)


def test_tokens_follow_the_distribution_under_every_rule(unlike: Native) -> None:
    """Chi-square over all positions, and over 300 first tokens; false alarm one in 10,000 each."""
    rules: list[dict[str, Any]] = [
        {},
        {"alpha_method": "kl_budget", "kl_budget": 0.1},
        {"alpha_method": "ess_balance"},
        {"alpha_method": "entropy"},
        {"alpha_method": "fixed", "fixed_alpha": 0.2},
    ]
    prompts = [(prompt, prompt) for prompt in ragged_prompts(20, seed=5)]
    pairs = Pairs(unlike.server, unlike.theta)
    rollouts = pairs.rollouts(prompts, [{"max_tokens": 30, **rules[i % 5]} for i in range(20)])
    assert [rollout["restarts"] for rollout in rollouts] == [0] * 20, "one request cannot fall out of step"
    assert max(of_pairs.largest_errors(rollouts, unlike.theta, unlike.t).values()) < TOLERANCE
    assert of_pairs.distribution_p_value(rollouts, unlike.theta, unlike.t) > 1e-4
    first = pairs.rollouts([prompts[0]] * 300, [{"max_tokens": 1}] * 300)
    distribution = np.exp(distributions_of(first[0], unlike.theta, unlike.t)[2][0])
    drawn = np.bincount([rollout["token_ids"][0] for rollout in first], minlength=VOCAB_SIZE)
    assert chi_square_p_value(drawn, 300 * distribution) > 1e-4


def test_without_a_target_tokens_are_the_policys(unlike: Native) -> None:
    """Beside others that have one. Chi-square, false alarm one in 10,000."""
    prompts = ragged_prompts(24, seed=2)
    pairs = Pairs(unlike.server, unlike.theta)
    sides = [(prompt, prompt if i % 3 == 0 else None) for i, prompt in enumerate(prompts)]
    rollouts = [one for one in pairs.rollouts(sides, [{"max_tokens": 40}] * 24) if one["prompts"][1] is None]
    assert all((rollout["alpha"] == 0).all() for rollout in rollouts)
    assert max(of_pairs.largest_errors(rollouts, unlike.theta).values()) < TOLERANCE
    assert of_pairs.distribution_p_value(rollouts, unlike.theta) > 1e-4


def test_ordinary_requests_are_the_policys(unlike: Native) -> None:
    body = {"model": unlike.server.name, "prompt": [3, 1, 4], "max_tokens": 20, "temperature": 0.0, "logprobs": 0}
    (choice,) = unlike.server.post("/v1/completions", {**body, "ignore_eos": True, "return_token_ids": True})["choices"]
    logp = logprobs_of(unlike.theta, [3, 1, 4, *choice["token_ids"]], 3, 1.0)
    assert choice["token_ids"] == logp.argmax(1).tolist()
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(logp.max(1), abs=TOLERANCE)


def test_whole_distributions_are_served_to_ordinary_requests(native: Native) -> None:
    """log q* of every token of the vocabulary, after 208 contexts, where the server was told to."""
    prompts = [prompt[:20] for prompt in ragged_prompts(13, seed=7)]
    for temperature, asked in ((1.0, prompts[::2]), (0.7, prompts[1::2])):
        body = {
            "model": native.server.name,
            "prompt": asked,
            "max_tokens": 16,
            "ignore_eos": True,
            "logprobs": VOCAB_SIZE,
            "temperature": temperature,
            "return_tokens_as_token_ids": True,
        }
        for prompt, choice in zip(asked, native.server.post("/v1/completions", body)["choices"], strict=True):
            rows = choice["logprobs"]["top_logprobs"]
            served = np.array([[row[f"token_id:{token}"] for token in range(VOCAB_SIZE)] for row in rows])
            text = [*prompt, *(int(token.removeprefix("token_id:")) for token in choice["logprobs"]["tokens"])]
            logps = [logprobs_of(model, text, len(prompt), temperature) for model in (native.theta, native.t)]
            alpha = solve_alpha(*logps)[:, None]
            path = (1 - alpha) * logps[0] + alpha * logps[1]
            assert np.abs(served - path + np.log(np.exp(path).sum(1, keepdims=True))).max() < 2e-3  # α is in float32


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_ordinary_requests_follow_the_distribution(native: Native, temperature: float) -> None:
    """512 draws of one position. Chi-square, false alarm one in 10,000, in 20 cells of tokens that are about as much
    likelier to one model than to the other: so many draws tell q* from π_θ."""
    prompt = list(range(80, 120))
    logps = [logprobs_of(model, [*prompt, 0], len(prompt), temperature) for model in (native.theta, native.t)]
    alpha = solve_alpha(*logps)[:, None]
    weights = np.exp((1 - alpha) * logps[0] + alpha * logps[1])[0]
    q, order = weights / weights.sum(), (logps[1] - logps[0])[0].argsort()
    cells = np.minimum(20 * q[order].cumsum(), 19).astype(int)

    def p_value(counts: np.ndarray) -> float:
        return chi_square_p_value(*(np.bincount(cells, of[order]) for of in (counts, 512 * q)))

    assert p_value(512 * np.exp(logps[0][0])) < 1e-6
    body = {
        "model": native.server.name,
        "prompt": prompt,
        "n": 512,
        "max_tokens": 1,
        "logprobs": 0,
        "ignore_eos": True,
        "temperature": temperature,
        "return_tokens_as_token_ids": True,
    }
    choices = native.server.post("/v1/completions", body)["choices"]
    drawn = [int(choice["logprobs"]["tokens"][0].removeprefix("token_id:")) for choice in choices]
    assert p_value(np.bincount(drawn, minlength=VOCAB_SIZE)) > 1e-4


def test_seeds_repeat(native: Native) -> None:
    first, second, other = (
        [output.generated_tokens for output in generate(native, ragged_prompts(3), max_tokens=12, seed=seed)]
        for seed in (5, 5, 6)
    )
    assert first == second != other


def test_a_stop_token_ends_the_sequence(native: Native) -> None:
    async def run() -> list[GenerationOutput]:
        async with DualVLLMCoordinator(CoordinatorConfig(engine="native", theta_url=native.url)) as coordinator:
            stops = range(0, VOCAB_SIZE, 3)
            return await coordinator.generate_batch(ragged_prompts(6), max_tokens=60, stop_token_ids=stops)

    for output in asyncio.run(run()):
        assert output.finish_reason == "stop" and output.generated_tokens[-1] % 3 == 0
        assert all(token % 3 for token in output.generated_tokens[:-1])


def test_streamed_tokens_have_exact_weights(native: Native) -> None:
    async def run() -> list[Any]:
        config = CoordinatorConfig(engine="native", theta_url=native.url, ignore_eos=True)
        async with DualVLLMCoordinator(config) as coordinator:
            return [chunk async for chunk in coordinator.generate_stream([3, 1, 4], max_tokens=40)]

    chunks = asyncio.run(run())
    text = [3, 1, 4] + [chunk.token_id for chunk in chunks]
    logp_theta = logprobs_of(native.theta, text, 3, 1.0)[np.arange(40), text[3:]]
    weights = np.exp(logp_theta - [chunk.logprob_q for chunk in chunks])
    assert [chunk.importance_weight for chunk in chunks] == pytest.approx(weights, rel=1e-3)
    assert chunks[-1].finish_reason == "length"


def test_new_weights_are_the_policys_alone(native: Native, tmp_path: Path) -> None:
    """All weights, then one tensor alone, as a transfer that sends them one by one would."""
    generate(native, [[1, 2, 3]], max_tokens=4)
    moved = perturbed_copy(native.server.model, tmp_path / "moved", noise=0.3, seed=9)
    try:
        reload_policy(native, moved)
        outputs = generate(native, ragged_prompts(8), max_tokens=30)
        assert_right(largest_errors(native, outputs, theta=load(moved)))

        name = "model.layers.1.mlp.down_proj.weight"
        theta = load(moved)
        with torch.no_grad():
            theta.get_parameter(name).mul_(1.5)
        (tmp_path / "one").mkdir()
        save_file({name: theta.get_parameter(name).data.contiguous()}, tmp_path / "one" / "model.safetensors")
        reload_policy(native, tmp_path / "one")
        outputs = generate(native, ragged_prompts(8), max_tokens=30)
        assert_right(largest_errors(native, outputs, theta=theta))
        missed = re.findall(r"(\w+): Failed to load weights", log_of_first_update(native.server))
        assert set(missed) <= {"RotaryEmbedding"}, "π_t's layers are not among those an update visits"
    finally:
        reload_policy(native, native.server.model)
    assert_right(largest_errors(native, generate(native, [[4, 5]], max_tokens=20)))


def reload_policy(native: Native, folder: Path) -> None:
    config = CoordinatorConfig(engine="native", theta_url=native.url)

    async def run() -> None:
        async with DualVLLMCoordinator(config) as coordinator:
            await coordinator.theta.reload_weights(str(folder))

    asyncio.run(run())


def log_of_first_update(server: NativeServer) -> str:
    """What vLLM said of the first weight update: its V1 runner names layers that it visits and has no weights for.

    Nothing where the V2 runner works on a GPU, which does not write where an update begins.
    """
    _, *updates = server.log.read_text().split("Reloading weights inplace")
    return updates[0].split("Reloading and processing weights took")[0] if updates else ""


class Checked(DualGRPOTrainer):
    """Keeps how far the server's log π_θ of each batch is from the trainer's own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.errors: list[float] = []

    def _generate(self, prompts: Any) -> Any:
        output = super()._generate(prompts)
        training = self.model.training
        self.model.eval()
        for prompt, completion, served in zip(*output[:2], self._rollout_columns["logprobs_theta"], strict=True):
            logp = logprobs_of(self.model, [*prompt, *completion], len(prompt), 1.0)
            own = logp[np.arange(len(completion)), completion]
            self.errors.append(float(np.abs(own - served).max()))
        self.model.train(training)
        return output


def test_a_trainer_learns_from_it(native: Native, tmp_path: Path) -> None:
    """Three steps: before each, the trainer's weights are the server's π_θ, and the target stays what it was.
    Evaluation is of the policy."""
    config = CoordinatorConfig(engine="native", theta_url=native.url)
    try:
        trainer = Checked(
            model=AutoModelForCausalLM.from_pretrained(native.server.model, dtype=torch.float32),
            reward_funcs=count_of_the,
            args=grpo_config(tmp_path, max_steps=3),
            train_dataset=chat_dataset(),
            eval_dataset=chat_dataset(),
            processing_class=make_tokenizer(),
            dual_config=config,
        )
        trainer.train()
        assert len(trainer.errors) == 12 and max(trainer.errors) < 1e-3
        moved = trainer.model.get_input_embeddings().weight - native.theta.get_input_embeddings().weight
        assert moved.abs().max() > 1e-3
        history = [entry for entry in trainer.state.log_history if "sampling/alpha/mean" in entry]
        assert len(history) == 3 and all(0 < entry["sampling/alpha/mean"] < 1 for entry in history)
        assert trainer.evaluate()["eval_sampling/alpha/mean"] == 0.0
        trainer.create_model_card(model_name="a-model")
        assert f"| target π_t | {native.server.target.name} |" in (tmp_path / "README.md").read_text()
    finally:
        reload_policy(native, native.server.model)
    assert_right(largest_errors(native, generate(native, [[4, 5]], max_tokens=20)))


def test_the_recipe_trains(unlike: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of recipes/native/README.md, after the one that started this server: two steps with a small model
    in place of the recipe's."""
    monkeypatch.chdir(REPOSITORY)
    doctor, train = (subcommands("recipes/native/README.md", name)[0] for name in ("doctor", "train"))
    assert main([unlike.url if word == "http://127.0.0.1:8000" else word for word in doctor]) == 0
    changes = {
        "model_name_or_path": unlike.server.model,
        "dual_theta_url": unlike.url,
        "output_dir": tmp_path,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "max_completion_length": 8,
    }
    flags = [str(word) for key, value in changes.items() for word in (f"--{key}", value)]
    try:
        assert main([*train, *flags]) == 0
        steps = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [entry["step"] for entry in steps] == [1, 2]
        assert all(0 < entry["sampling/alpha/mean"] < 1 for entry in steps)
        assert all(0 < entry["sampling/importance_sampling_ratio/mean"] < 3 for entry in steps)
        assert max(entry["sampling/policy_drift/max"] for entry in steps) < 1e-3
    finally:
        reload_policy(unlike, unlike.server.model)


class CheckedGRPOTrainer(GRPOTrainer):
    """TRL's own: compares its ratios with what they should be by the models' whole distributions."""

    target: Any
    checked: int = 0
    error: float = 0.0
    farthest: float = 0.0

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.model.eval()
        columns = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "importance_sampling_ratio")
        for prompt, prompt_mask, ids, mask, ratio in zip(*(output[name] for name in columns), strict=True):
            text, start = [*prompt[prompt_mask.bool()].tolist(), *ids[mask.bool()].tolist()], int(prompt_mask.sum())
            logp_theta, logp_t = (logprobs_of(model, text, start, 1.0) for model in (self.model, self.target))
            alpha = solve_alpha(logp_theta, logp_t)[:, None]
            path = (1 - alpha) * logp_theta + alpha * logp_t
            weights = logp_theta - path + np.log(np.exp(path).sum(1, keepdims=True))
            expected = np.exp(weights[np.arange(len(weights)), text[start:]]).clip(max=3.0)
            self.error = max(self.error, float(np.abs(ratio[mask.bool()].numpy() - expected).max()))
            self.farthest = max(self.farthest, float(np.abs(expected - 1).max()))
            self.checked += len(expected)
        self.model.train()
        return output


@pytest.mark.parametrize("adapter", [None, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)])
def test_trls_own_trainer_forms_the_right_ratio(
    native: Native, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: LoraConfig | None
) -> None:
    """`GRPOTrainer(use_vllm=True)` on this server, without our trainer; the weights go by files."""
    sent = send_by_files(monkeypatch, tmp_path)
    server = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": native.url}
    try:
        trainer = CheckedGRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(native.server.model, dtype=torch.float32),
            reward_funcs=count_of_the,
            args=grpo_config(tmp_path, **server, vllm_importance_sampling_mode="token_truncate"),
            train_dataset=chat_dataset(),
            processing_class=make_tokenizer(),
            peft_config=adapter,
        )
        trainer.target = native.t
        trainer.train()
        assert len(sent) == 2 and sent[0] == sent[1] == set(load_file(native.server.model / "model.safetensors"))
        assert trainer.checked > 20 and trainer.farthest > 0.1
        assert trainer.error < 2e-3
    finally:
        reload_policy(native, native.server.model)
    assert_right(largest_errors(native, generate(native, [[4, 5]], max_tokens=20)))


def test_doctor_knows_it(native: Native) -> None:
    found = report(native.url, None)
    lacking = {check["name"]: check["fix"] for check in found["checks"] if check["status"] != "ok"}
    assert found["ok"] and lacking.pop("LoRA loading").startswith("two models take no adapters")
    assert set(lacking) <= {"weights"}, "another test may have trained with it, and nothing else is amiss"
    server = found["servers"]["native"]
    assert (server["vocab_size"], server["target"]) == (VOCAB_SIZE, str(native.server.target))


def test_generated_rows_name_the_server_for_both_models(native: Native, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": [1, 2, 3]}\n')
    flags = ["--engine", "native", "--theta-url", native.url, "--format", "jsonl", "--max-tokens", "4"]
    command = ["generate", "--input", str(tmp_path / "prompts.jsonl"), "--output", str(tmp_path / "out"), *flags]
    assert main(command) == 0
    (shard,) = (tmp_path / "out").glob("train-*.jsonl")
    versions = json.loads(json.loads(shard.read_text())["versions"])
    assert versions["theta"] == versions["t"] and versions["theta"]["root"] == str(native.server.model)
    assert re.match(r"0\.\d+", versions["theta"]["server"]) and versions["theta"]["logprob"] < 0
    assert main(command) == 0, "it goes on from the same server"


# As graphs of one pool replay: the token ids are read where they were at the capture, and both models' results lie in
# the same memory, which is not theirs once the model has returned and another runs. π_t, which has 8 tokens, is not
# asked for the tenth.
CUDA_GRAPHS = """
import torch
from dual_rollout.native.model import DualRolloutForCausalLM
pool, runners_buffer = torch.empty(3, 2), torch.tensor([5, 6, 9])
def replay(scale):
    def model(input_ids, positions):
        assert input_ids.data_ptr() == runners_buffer.data_ptr()
        return pool.copy_(scale * runners_buffer[:, None])
    return model
model = DualRolloutForCausalLM.__new__(DualRolloutForCausalLM)
torch.nn.Module.__init__(model)
model.theta, model.t, model._vocab_size_t, model._t_has_fewer_tokens = replay(1.0), replay(10.0), 8, True
model._hidden_size_theta = model._hidden_size_t = 2
hidden = model.forward(runners_buffer[:3], torch.arange(3))
assert hidden.tolist() == [[5, 5, 50, 50], [6, 6, 60, 60], [9, 9, 70, 70]], hidden
"""


def test_what_two_models_cannot_do_is_refused_and_they_do_not_meet_in_the_memory_of_cuda_graphs(native: Native) -> None:
    """As the engine builds the model, without the rest of a server; both in one process, which imports vLLM."""
    program = f"""
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import EngineArgs
from dual_rollout.native.model import DualRolloutForCausalLM
from dual_rollout.native.serving import config_overrides
theta, t = {str(native.server.model)!r}, {str(native.server.target)!r}
options = dict(model=theta, hf_overrides=config_overrides(theta, t), dtype="float32", max_model_len=256)
config = EngineArgs(**options, enable_lora=True, load_format="dummy").create_engine_config()
config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL
quantized = {{"quant_method": "fp8", "ignored_layers": ["lm_head"]}}
config.model_config.hf_config.quantization_config = quantized
config.model_config.hf_config.dual_rollout["architectures"] = ["MambaForCausalLM"]
try:
    DualRolloutForCausalLM(vllm_config=config)
except ValueError as error:
    message = str(error)
expected = (
    "dual-rollout's native engine does not work with LoRA (--enable-lora)",
    "; nor with --load-format dummy: it does not read the target's weights",
    "; nor with full CUDA graphs for prompts",
    "; nor with models with a recurrent state",
    "; nor with quantisation of one model only",
    "; nor with quantisation of a list of layers",
)
assert all(refused in message for refused in expected), message
"""
    run_in_vllms_python(CUDA_GRAPHS + program)
