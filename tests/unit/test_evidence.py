"""The experiment of recipes/evidence: what its sampler draws, what its tasks teach, and that a run leaves a result."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dual_rollout.functional.alpha_methods import kl_budget_alpha
from dual_rollout.functional.kl_symmetry import solve_alpha
from recipes.evidence import figures, supervised
from recipes.evidence.arms import ARMS, SCALES, TUNING_SEED
from recipes.evidence.models import load_model
from recipes.evidence.run import Run, choose_rates, parse, runs, second_round, train, tuning_runs
from recipes.evidence.sampler import Method, PairSampler, path_distribution
from recipes.evidence.tasks import TASKS
from recipes.evidence.training import Workbench
from tests.chi_square import chi_square_p_value
from tests.tiny_model import make_tiny_model, perturbed_copy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("evidence")
    start = make_tiny_model(folder / "start")
    return start, perturbed_copy(start, folder / "teacher", noise=0.5)


@pytest.mark.parametrize(
    ("method", "value"), [("kl_symmetry", 0.0), ("kl_budget", 0.3), ("kl_budget", 0.0), ("fixed", 0.7)]
)
def test_alpha_and_q_are_those_of_the_numpy_reference(method: Method, value: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits_theta = 3.0 * torch.randn(300, 500, generator=generator)
    logits_t = 0.8 * logits_theta + 2.0 * torch.randn(300, 500, generator=generator)
    path = path_distribution(logits_theta, logits_t, method, torch.tensor(value))
    logp_theta, logp_t = (logits.double().log_softmax(1).numpy() for logits in (logits_theta, logits_t))
    expected = {
        "kl_symmetry": lambda: solve_alpha(logp_theta, logp_t),
        "kl_budget": lambda: kl_budget_alpha(logp_theta, logp_t, value),
        "fixed": lambda: np.full(300, value),
    }[method]()
    alpha = path.alpha[:, 0].double().numpy()
    np.testing.assert_allclose(alpha, expected, atol=2e-4)
    log_q = (1 - alpha[:, None]) * logp_theta + alpha[:, None] * logp_t
    log_q -= np.log(np.exp(log_q).sum(1, keepdims=True))
    np.testing.assert_allclose(path.logprobs.numpy(), log_q, atol=1e-4)
    for found, logp in ((path.kl_theta, logp_theta), (path.kl_t, logp_t)):
        np.testing.assert_allclose(found[:, 0].numpy(), (np.exp(log_q) * (log_q - logp)).sum(1), atol=1e-4)


def test_sequences_have_the_enumerated_distribution_and_their_exact_numbers(folders: tuple[Path, Path]) -> None:
    """Two tokens after prompts of unlike length, which the models see differently. False alarm: 1 in 1000."""
    theta, t = (load_model(folder).eval() for folder in folders)
    rows, prompts, t_prompts = 4000, ([5, 6, 7], [9]), ([5, 8], [9, 3, 4, 6])
    sampler = PairSampler(theta, t, rows=rows, prompt_width=5, max_tokens=2, stop_id=2, seed=1)
    samples = sampler.generate(
        [prompts[i % 2] for i in range(rows)], [t_prompts[i % 2] for i in range(rows)], method="kl_symmetry"
    )
    batch = samples.batch
    for group in range(2):
        firsts = batch.completion_ids[group::2, 0]
        with torch.no_grad():
            logits = [
                model(torch.tensor([side[group]])).logits[:, -1] for model, side in ((theta, prompts), (t, t_prompts))
            ]
        first = path_distribution(*logits, "kl_symmetry", torch.tensor(0.0))
        counts = torch.bincount(firsts, minlength=first.logprobs.shape[1]).numpy()
        expected = first.logprobs.double().softmax(1)[0].numpy() * len(firsts)
        assert chi_square_p_value(counts, expected) > 1e-3 / 4
        # After the most frequent first token, the second.
        token = int(counts.argmax())
        chosen = (batch.completion_ids[:, 0] == token) & (torch.arange(rows) % 2 == group)
        with torch.no_grad():
            logits = [
                model(torch.tensor([[*side[group], token]])).logits[:, -1]
                for model, side in ((theta, prompts), (t, t_prompts))
            ]
        second = path_distribution(*logits, "kl_symmetry", torch.tensor(0.0))
        seconds = batch.completion_ids[chosen, 1]
        expected = second.logprobs.double().softmax(1)[0].numpy() * len(seconds)
        counts = torch.bincount(seconds, minlength=len(expected)).numpy()
        assert chi_square_p_value(counts, expected) > 1e-3 / 4
        for column, of_all in (
            (batch.logprobs_q, second.logprobs[0]),
            (batch.logprobs_theta, logits[0][0].log_softmax(0)),
            (batch.logprobs_t, logits[1][0].log_softmax(0)),
        ):
            torch.testing.assert_close(column[chosen, 1], of_all[seconds], atol=1e-4, rtol=0)
        torch.testing.assert_close(
            samples.kl_theta[chosen, 1], second.kl_theta[0].expand(len(seconds)), atol=1e-4, rtol=0
        )


def test_greedy_is_what_transformers_generates(folders: tuple[Path, Path]) -> None:
    model = load_model(folders[0]).eval()
    sampler = PairSampler(model, None, rows=2, prompt_width=6, max_tokens=8, stop_id=2)
    prompts = [[5, 6, 7, 8], [9, 10]]
    batch = sampler.generate(prompts, method="policy", greedy=True).batch
    for prompt, row, mask in zip(prompts, batch.completion_ids, batch.completion_mask, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False, max_new_tokens=8
        )
        assert row[mask.bool()].tolist() == expected[0, len(prompt) :].tolist()


def test_the_sampler_reads_the_weights_as_they_are_now(folders: tuple[Path, Path]) -> None:
    model, other = (load_model(folder).eval() for folder in folders)
    sampler = PairSampler(model, None, rows=1, prompt_width=4, max_tokens=6, stop_id=2)
    before = sampler.generate([[5, 6, 7]], method="policy", seed=3).batch
    model.load_state_dict(other.state_dict())
    after = sampler.generate([[5, 6, 7]], method="policy", seed=3).batch
    fresh = PairSampler(other, None, rows=1, prompt_width=4, max_tokens=6, stop_id=2)
    assert torch.equal(after.logprobs_theta, fresh.generate([[5, 6, 7]], method="policy", seed=3).batch.logprobs_theta)
    assert not torch.equal(before.logprobs_theta, after.logprobs_theta)


@pytest.mark.parametrize("name", TASKS)
def test_worked_solutions_are_right_and_nothing_held_out_is_taught(name: str) -> None:
    task = TASKS[name]
    rows, success = task.training_rows()
    few = rows.select(range(100))
    assert success([task.solution(question) for question in few["question"]], few["task_index"]) == [1.0] * 100
    assert success([f"{answer}0" for answer in few["answer"]], few["task_index"]).count(1.0) < 10
    held_out = set(task.held_out_rows()[0]["question"])
    assert len(held_out) >= 256
    assert not held_out & {*rows["question"], *(question for question, _ in task.worked(3000))}


@pytest.fixture(scope="module")
def bench(folders: tuple[Path, Path]) -> Workbench:
    task = replace(TASKS["short_sums"], max_tokens=6)
    scale = replace(SCALES["cpu"], prompts=2, generations=4, micro=4, evaluate_every=1, held_out=4)
    return Workbench(task, scale, *folders)


@pytest.mark.parametrize(
    "arm",
    ["kl_budget", "sft_grpo", "distillation", "distillation_from_q", "answer_in_prompt", "kl_symmetry_policy_baseline"],
)
def test_a_run_leaves_a_result_that_figures_reads(bench: Workbench, arm: str, tmp_path: Path) -> None:
    run = Run("short_sums", arm, seed=3, learning_rate=1e-3, steps=2, path=tmp_path / f"{arm}-3.jsonl")
    train(run, bench.scale, bench)
    result = figures.Result.from_file(run.path)
    assert [step["step"] for step in result.steps] == [1, 2]
    assert [line["tokens"] for line in result.evaluations] == np.cumsum(
        [0, *(s["tokens"] for s in result.steps)]
    ).tolist()
    if arm == "kl_budget":  # the schedule ends at the policy
        assert result.steps[0]["kl_theta"] > 1e-3 and result.steps[-1]["alpha"] == 0
        assert result.steps[-1]["drift"] < 1e-4
    if arm == "distillation":  # the tiny model's rewards are all zero, which moves no other arm
        assert result.moved["kl_per_token"] > 1e-6
    table = figures.success_table(figures.results_of(tmp_path))
    assert f"| `{arm}` | 0.001 | 1 |" in table


def test_a_policy_starts_anew_in_every_run(bench: Workbench) -> None:
    for parameter in bench.policy.parameters():
        parameter.data.add_(1.0)
    fresh = bench.reset().state_dict()
    assert all(torch.equal(fresh[name], tensor) for name, tensor in bench.start.state_dict().items())


def test_bands_and_tables(tmp_path: Path) -> None:
    mean, low, high = figures.mean_and_band([0.1, 0.2, 0.3, 0.4])
    assert mean == pytest.approx(0.25) and 0.1 <= low < 0.2 < 0.3 < high <= 0.4
    assert figures.mean_and_band([0.3]) == (0.3, 0.3, 0.3)
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\nkept\n<!-- end -->\n"
    assert figures.fill(text, {"x": "new"}) == text.replace("old", "new")


def test_the_documents_tables_are_those_of_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    document = Path("docs/evidence.md")
    if not document.exists() or not figures.RESULTS.exists():
        pytest.skip("no results yet")
    for folder in figures.RESULTS.iterdir():
        results = figures.results_of(folder)
        if results:
            assert figures.success_table(results) in document.read_text()


def test_every_arm_is_a_valid_config() -> None:
    for arm in ARMS.values():
        config: Any = arm.config()
        arm.schedule.at(config, 1.0)
    assert json.dumps(sorted(ARMS))


def write_result(run: Run, sampled: float) -> None:
    """The lines of a finished run that planning reads."""
    run.path.parent.mkdir(parents=True, exist_ok=True)
    head = {"kind": "run", "arm": run.arm, "seed": run.seed, "learning_rate": run.learning_rate}
    run.path.write_text("\n".join(map(json.dumps, (head, {"kind": "final", "sampled": sampled}))))


def test_a_second_round_decides_between_rates_that_the_first_cannot_tell_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {
        "grpo": {3e-6: 0.01, 1e-6: 0.01, 1e-5: 0.03},
        "kl_symmetry": {3e-6: 0.010, 1e-6: 0.012, 1e-5: 0.009},
    }
    command = ["run", "--results", str(tmp_path), "--tasks", "products", "--arms", *first, "kl_symmetry_unweighted"]
    monkeypatch.setattr("sys.argv", command)
    options = parse()
    for run in tuning_runs(options):
        write_result(run, first[run.arm][run.learning_rate])
    choose_rates(tmp_path / "products")
    again = second_round(options)
    assert {(run.arm, run.seed, run.steps) for run in again} == {("kl_symmetry", TUNING_SEED + 1, 100)}
    assert sorted(run.learning_rate for run in again) == [1e-6, 3e-6, 1e-5]
    old = [run for run in runs(options) if run.arm == "kl_symmetry"]
    assert {run.learning_rate for run in old} == {1e-6}
    for run in [*again, *old]:
        write_result(run, first["grpo"][run.learning_rate])
    assert all(run.is_done for run in [*again, *old])
    choose_rates(tmp_path / "products")
    new = runs(options)
    assert {run.learning_rate for run in new} == {1e-5}
    assert not any(run.is_done for run in new), "a result at another learning rate is another run's"
    assert TUNING_SEED + 1 not in {run.seed for run in new}
    assert second_round(options) == again


def test_variants_of_the_weights_run_on_the_hard_task_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["run"])
    planned = {(run.task, run.arm) for run in runs(parse())}
    assert ("products", "kl_symmetry_unweighted") in planned and ("short_sums", "kl_symmetry") in planned
    assert ("short_sums", "kl_symmetry_unweighted") not in planned


def test_supervised_losses_are_those_of_their_definitions(folders: tuple[Path, Path]) -> None:
    """Updates of no size, so that each loss is that of the untouched model; rows of unlike length in two parts."""
    model, teacher = (load_model(folder).eval() for folder in folders)
    rows = [([5, 6, 7], [8, 9, 2]), ([4], [3, 2]), ([9, 9], [7])]
    cross_entropy, divergence = [], []
    for prompt, completion in rows:
        ids = torch.tensor([[*prompt, *completion]])
        with torch.no_grad():
            logp, logp_t = (m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(1) for m in (model, teacher))
        cross_entropy += [-logp[i, token].item() for i, token in enumerate(completion)]
        divergence += (logp.exp() * (logp - logp_t)).sum(1).tolist()
    optimiser = supervised.Optimiser(model, learning_rate=0.0)
    assert supervised.imitate(model, optimiser, rows, micro=2) == pytest.approx(np.mean(cross_entropy), abs=1e-4)
    assert supervised.distil(model, teacher, optimiser, rows, micro=2) == pytest.approx(np.mean(divergence), abs=1e-4)
