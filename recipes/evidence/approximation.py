"""How far q* of two top-k lists is from q* of both whole vocabularies, on real models and real text.

    python recipes/evidence/approximation.py --model outputs/models/SmolLM2-135M-Instruct

Three targets for SmolLM2-135M-Instruct: a copy with 12% noise on its weights, a copy fine-tuned for a few minutes on
worked sums, and the same model that is shown the answer. Two kinds of text: rollouts of the pair's own q*, and this
repository's documentation. At every position both models' whole distributions are computed, the lists that servers
would give are cut out of them, and what the library makes of the lists is compared with what it makes of the whole.
Results are written to recipes/evidence/results/approximation.json; --table prints the table in docs/mathematics.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_rollout.functional import merge_lists, next_token_distribution, sample_rows
from dual_rollout.functional.diagnostics import log_diagnostics
from dual_rollout.functional.kl_symmetry import log_q_star, solve_alpha
from dual_rollout.training.tasks import load_task
from dual_rollout.types import NO_TOKEN, TopK

LENGTHS = (20, 50, 100, 200, 1000)
SUPPORTS: tuple[Literal["union", "tail"], ...] = ("union", "tail")
RESULTS = Path(__file__).parent / "results" / "approximation.json"
DOCS = Path(__file__).parents[2] / "docs"
NOISE = 0.12
ROLLOUTS, ROLLOUT_TOKENS = 16, 48
WINDOWS, WINDOW_TOKENS = 8, 96
FINE_TUNING_STEPS, FINE_TUNING_BATCH, FINE_TUNING_RATE, FINE_TUNED_LAYERS = 8, 4, 3e-4, 10
_ROWS = 64  # positions computed at once
_SEED = 0


@dataclass(frozen=True)
class Text:
    """One text with its beginning in both models' words; only the positions of `tokens` are measured."""

    before_theta: list[int]
    before_t: list[int]
    tokens: list[int]


# ---- the pairs ------------------------------------------------------------------------------------------------------


def with_noise(model: Any) -> Any:
    """Gaussian noise on every matrix, `NOISE` times its own deviation; in place."""
    generator = torch.Generator().manual_seed(_SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * NOISE * parameter.std())
    return model


def fine_tuned(model: Any, tokenizer: Any) -> Any:
    """A few minutes of supervised fine-tuning of the last layers on worked sums; in place."""
    rows, _ = load_task("chain_sum", size=FINE_TUNING_STEPS * FINE_TUNING_BATCH, seed=1000, options={})
    trained = [parameter for layer in model.model.layers[-FINE_TUNED_LAYERS:] for parameter in layer.parameters()]
    for parameter in set(model.parameters()) - set(trained):
        parameter.requires_grad = False
    optimiser = torch.optim.AdamW(trained, lr=FINE_TUNING_RATE, weight_decay=0.0)
    for step in range(FINE_TUNING_STEPS):
        loss = 0.0
        for row in rows.select(range(step * FINE_TUNING_BATCH, (step + 1) * FINE_TUNING_BATCH)):
            prompt = chat(tokenizer, row["question"])
            text = torch.tensor([[*prompt, *tokenizer(worked(row["question"]))["input_ids"], tokenizer.eos_token_id]])
            labels = text.clone()
            labels[:, : len(prompt)] = -100
            part = model(input_ids=text, labels=labels).loss / FINE_TUNING_BATCH
            part.backward()
            loss += part.item()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        optimiser.zero_grad()
        print(f"fine-tuning, step {step}: {loss:.3f} nats a token", flush=True)
    return model


def worked(question: str) -> str:
    """A sum, one operation a line."""
    terms = [int(term.replace(" ", "")) for term in re.findall(r"(?:[+-] )?\d+", question)]
    lines, total = [], terms[0]
    for term in terms[1:]:
        lines.append(f"{total} {'-' if term < 0 else '+'} {abs(term)} = {total + term}")
        total += term
    return "\n".join([*lines, f"The answer is {total}."])


def chat(tokenizer: Any, *turns: str) -> list[int]:
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- the texts ------------------------------------------------------------------------------------------------------


def rollout_texts(theta: Any, t: Any, tokenizer: Any, shows_answer: bool) -> list[Text]:
    """Questions, and what q* of the whole vocabularies says after them."""
    rows, _ = load_task("chain_sum", size=ROLLOUTS, seed=0, options={})
    before_theta = [chat(tokenizer, question) for question in rows["question"]]
    before_t = before_theta
    if shows_answer:
        hints = (f"{q}\nThe solution is:\n{worked(q)}\nAnswer in your own words." for q in rows["question"])
        before_t = [chat(tokenizer, hint) for hint in hints]
    rng, eos = np.random.default_rng(_SEED), tokenizer.eos_token_id
    readers = [Reader(theta, before_theta), Reader(t, before_t)]
    tokens = np.zeros((ROLLOUTS, 0), dtype=np.int64)
    for _ in range(ROLLOUT_TOKENS):
        logps = [reader.next_logprobs(tokens) for reader in readers]
        q = np.exp(log_q_star(*logps, solve_alpha(*logps))[0])
        tokens = np.column_stack([tokens, sample_rows(q, rng.random(ROLLOUTS))])
    ended = [row.index(eos) + 1 if eos in row else len(row) for row in tokens.tolist()]
    return [
        Text(*before, row[:end])
        for before, row, end in zip(zip(before_theta, before_t, strict=True), tokens.tolist(), ended, strict=True)
    ]


class Reader:
    """A model that reads several texts as they grow, their beginnings padded on the left."""

    def __init__(self, model: Any, beginnings: Sequence[list[int]]):
        width = max(map(len, beginnings))
        self._model, self._cache = model, None
        self._input = torch.tensor([[0] * (width - len(ids)) + ids for ids in beginnings])
        self._mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in beginnings])

    def next_logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """`(B, V)` log-probabilities of what follows the beginnings and `tokens` `(B, T)`, T one more at each call."""
        if tokens.shape[1]:
            self._input = torch.tensor(tokens[:, -1:])
            self._mask = torch.cat([self._mask, torch.ones_like(self._input)], dim=1)
        positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._input.shape[1] :]
        with torch.no_grad():
            output = self._model(
                self._input,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._cache = output.past_key_values
        return output.logits[:, -1].double().log_softmax(-1).numpy()


def documentation_texts(tokenizer: Any, shows_answer: bool) -> list[Text]:
    """Windows of the documentation, the same number of each file until there are enough."""
    before = chat(tokenizer, "Write a page of documentation.")
    texts = []
    for path in sorted(DOCS.glob("*.md"))[:WINDOWS]:
        ids = tokenizer(path.read_text(), add_special_tokens=False)["input_ids"]
        window = ids[len(ids) // 2 :][:WINDOW_TOKENS]
        hint = f"Write a page of documentation. It must say:\n{tokenizer.decode(window)}"
        texts.append(Text(before, chat(tokenizer, hint) if shows_answer else before, window))
    return texts


# ---- the measure ----------------------------------------------------------------------------------------------------


def distributions(theta: Any, t: Any, texts: Sequence[Text]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """log π_θ and log π_t at all positions, `(<= _ROWS, V)` float64 at a time."""
    for text in texts:
        rows = []
        for model, before in ((theta, text.before_theta), (t, text.before_t)):
            with torch.no_grad():
                logits = model(torch.tensor([[*before, *text.tokens]])).logits[0]
            rows.append(logits[len(before) - 1 : -1].double().log_softmax(-1).numpy())
        for start in range(0, len(text.tokens), _ROWS):
            yield rows[0][start : start + _ROWS], rows[1][start : start + _ROWS]


def longest_list(logp: np.ndarray) -> TopK:
    """The list of the most tokens that is measured, the likeliest first, in float32 as a server gives it."""
    ids = np.argpartition(-logp, LENGTHS[-1], axis=1)[:, : LENGTHS[-1]]
    order = np.argsort(-np.take_along_axis(logp, ids, axis=1), axis=1)
    ids = np.take_along_axis(ids, order, axis=1)
    logprobs = np.take_along_axis(logp, ids, axis=1).astype(np.float32).astype(np.float64)
    return TopK(ids, logprobs, False, logp.shape[1])


def first(top: TopK, k: int) -> TopK:
    return replace(top, token_ids=top.token_ids[:, :k].copy(), logprobs=top.logprobs[:, :k])


def compared(logp_theta: np.ndarray, logp_t: np.ndarray) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """For each k and support, arrays of a number per position."""
    alpha = solve_alpha(logp_theta, logp_t)
    log_q, psi = log_q_star(logp_theta, logp_t, alpha)
    q, p = np.exp(log_q), np.exp(logp_theta)
    tops = longest_list(logp_theta), longest_list(logp_t)
    for k in LENGTHS:
        for support in SUPPORTS:
            candidates = merge_lists(*(first(top, k) for top in tops), support)
            found = next_token_distribution(candidates)
            q_k = np.zeros_like(q)
            rows, columns = np.nonzero(candidates.token_ids != NO_TOKEN)
            q_k[rows, candidates.token_ids[rows, columns]] = np.exp(found.log_q[rows, columns])
            inside = np.zeros(q.shape, dtype=bool)
            inside[rows, candidates.token_ids[rows, columns]] = True
            outside = np.where(inside, 0.0, p)
            lost = outside.sum(axis=1)
            if support == "tail":  # distributed as π_θ outside S
                q_k += outside * (np.exp(found.log_q[:, -1]) / lost)[:, None]
                lost = np.zeros_like(lost)
            kl = log_diagnostics(candidates.logp_theta, candidates.logp_t, found.log_q, found.alpha)["kl_theta"]
            covered = np.minimum(candidates.coverage_theta, candidates.coverage_t)
            yield (
                f"{support} {k}",
                {
                    "coverage_theta": candidates.coverage_theta,
                    "coverage_t": candidates.coverage_t,
                    "kl_full": -psi,
                    "kl_error": np.abs(kl + psi),
                    "alpha_error": np.abs(found.alpha - alpha),
                    "total_variation": 0.5 * np.abs(q_k - q).sum(axis=1),
                    "lost_policy_mass": lost,  # the largest bias of E_q[w f] over all f with values in [0, 1]
                    "bound_constant": np.abs(kl + psi) / ((1.0 - covered) * math.log(logp_theta.shape[1])),
                },
            )


def summary(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, float]:
    """Means over positions, a few quantiles, and the KL's error relative to the mean KL."""
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    kl = columns["kl_full"].mean()
    return {
        "positions": len(columns["kl_full"]),
        **{name: float(values.mean()) for name, values in columns.items() if name != "bound_constant"},
        "kl_error_of_mean": float(columns["kl_error"].mean() / kl),
        "alpha_error_95": float(np.quantile(columns["alpha_error"], 0.95)),
        "total_variation_95": float(np.quantile(columns["total_variation"], 0.95)),
        "lost_over_256_tokens": float(1.0 - np.exp(256 * np.log1p(-columns["lost_policy_mass"]).mean())),
        "bound_constant_99": float(np.quantile(columns["bound_constant"], 0.99)),
        "bound_constant_max": float(columns["bound_constant"].max()),
    }


def measure(model: str) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(model)

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    theta, results = load(), {}
    pairs = {"noised": with_noise(load()), "fine-tuned": fine_tuned(load(), tokenizer), "answer shown": theta}
    for pair, t in pairs.items():
        shows_answer = t is theta
        texts = {
            "rollouts": rollout_texts(theta, t, tokenizer, shows_answer),
            "documentation": documentation_texts(tokenizer, shows_answer),
        }
        results[pair] = {}
        for kind, some in texts.items():
            parts: dict[str, list[dict[str, np.ndarray]]] = {}
            for rows in distributions(theta, t, some):
                for name, numbers in compared(*rows):
                    parts.setdefault(name, []).append(numbers)
            results[pair][kind] = {name: summary(numbers) for name, numbers in parts.items()}
            print(pair, kind, json.dumps(results[pair][kind]["union 100"]), flush=True)
    return {
        "model": Path(model).name,
        "noise": NOISE,
        "fine_tuning": {
            "task": "chain_sum",
            "steps": FINE_TUNING_STEPS,
            "batch": FINE_TUNING_BATCH,
            "rate": FINE_TUNING_RATE,
            "layers": FINE_TUNED_LAYERS,
        },
        "seed": _SEED,
        "pairs": results,
    }


def table(results: dict[str, Any]) -> str:
    """As in docs/mathematics.md: each number the mean over positions; of both texts, "rollouts / documentation"."""
    lines = [
        "| target | k | coverage θ | coverage t | error of KL | error of α | TV, union | TV, tail | lost, union |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pair, kinds in results["pairs"].items():
        for k in LENGTHS:
            union = [kinds[kind][f"union {k}"] for kind in kinds]
            tail = [kinds[kind][f"tail {k}"] for kind in kinds]

            def both(rows: list[dict[str, float]], name: str, form: str) -> str:
                return " / ".join(format(row[name], form) for row in rows)

            cells = [
                both(union, "coverage_theta", ".3f"),
                both(union, "coverage_t", ".3f"),
                both(union, "kl_error_of_mean", ".2%"),
                both(union, "alpha_error", ".4f"),
                both(union, "total_variation", ".4f"),
                both(tail, "total_variation", ".4f"),
                both(union, "lost_policy_mass", ".4f"),
            ]
            lines.append("| " + " | ".join([pair, str(k), *cells]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="outputs/models/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--table", action="store_true", help="print the table of the results that are there")
    options = parser.parse_args()
    if not options.table:
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(measure(options.model), indent=1) + "\n")
    print(table(json.loads(RESULTS.read_text())))


if __name__ == "__main__":
    main()
