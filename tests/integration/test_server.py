"""The embedded server, started as users start it, against plain transformers and vLLM's answers."""

from __future__ import annotations

import base64
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from dual_rollout.exceptions import EngineUnavailableError  # noqa: E402
from dual_rollout.server.launch import EmbeddedServer  # noqa: E402
from tests.hang import HANG  # noqa: E402
from tests.tiny_model import make_tiny_model, perturbed_copy  # noqa: E402
from tests.warm_servers import WarmServer  # noqa: E402

ENV = {"OMP_NUM_THREADS": "1"}
VOCAB = 289
EOS = 288
TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="session")
def other_dir(model_dir: Path) -> Path:
    return perturbed_copy(model_dir, model_dir.parent / "other", noise=0.3, seed=3)


@pytest.fixture(scope="session")
def server(model_dir: Path) -> Iterator[EmbeddedServer]:
    flags = ["--served-model-name", "tiny", "--max-logprobs", "300", "--max-model-len", "256"]
    with EmbeddedServer(model_dir, flags, env=ENV) as running:
        yield running


@pytest.fixture(scope="session")
def reference(model_dir: Path) -> Any:
    return _load(model_dir)


def _load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _expected(model: Any, token_ids: list[int]) -> np.ndarray:
    """Log-probabilities ``(T, V)`` of a plain forward."""
    with torch.no_grad():
        return model(torch.tensor([token_ids])).logits[0].log_softmax(-1).numpy()


def _call(server: EmbeddedServer, path: str, body: Any = None, *, raw: bytes | None = None) -> tuple[int, Any]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=HANG) as answer:
            text, status = answer.read(), answer.status
    except urllib.error.HTTPError as error:
        text, status = error.read(), error.code
    try:
        return status, json.loads(text)
    except json.JSONDecodeError:
        return status, text.decode()


def _complete(server: EmbeddedServer, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {
        "prompt": prompt,
        "max_tokens": 1,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
        **fields,
    }
    status, answer = _call(server, "/v1/completions", body)
    assert status == 200, answer
    return answer


def _vector(entry: dict[str, float]) -> np.ndarray:
    """A full list of log-probabilities as an array over token ids."""
    vector = np.full(VOCAB, np.nan)
    for key, value in entry.items():
        vector[int(key.removeprefix("token_id:"))] = value
    return vector


def _metrics(server: EmbeddedServer) -> dict[str, float]:
    with urllib.request.urlopen(server.url + "/metrics") as answer:
        lines = answer.read().decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.split("{")[0]: float(value) for name, value in pairs}


def _prompt(rng: np.random.Generator, length: int) -> list[int]:
    return rng.integers(0, VOCAB - 3, length).tolist()


# Log-probabilities against plain transformers


def test_ragged_batch_and_decode_steps_match_a_plain_forward(server: EmbeddedServer, reference: Any) -> None:
    rng = np.random.default_rng(0)
    prompts = [_prompt(rng, length) for length in (1, 2, 7, 40, 130, 41)]
    answer = _complete(server, prompts, max_tokens=6, logprobs=VOCAB, ignore_eos=True, seed=1)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        tokens = prompt + choice["token_ids"]
        expected = _expected(reference, tokens)[len(prompt) - 1 : -1]
        got = np.stack([_vector(entry) for entry in choice["logprobs"]["top_logprobs"]])
        assert np.abs(got - expected).max() < TOLERANCE
        own = expected[np.arange(6), choice["token_ids"]]
        assert np.abs(np.array(choice["logprobs"]["token_logprobs"]) - own).max() < TOLERANCE


def test_prompts_longer_than_a_step_are_computed_in_chunks(model_dir: Path, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(1), 501)
    with WarmServer(model_dir, ["--max-logprobs", "-1"], env=ENV) as long_server:
        both = [prompt[:500], prompt[1:]]
        answer = _complete(long_server, both, logprobs=VOCAB, prompt_logprobs=1)
    for ids, choice in zip(both, answer["choices"], strict=True):
        expected = _expected(reference, ids)
        assert np.abs(_vector(choice["logprobs"]["top_logprobs"][0]) - expected[-1]).max() < TOLERANCE
        rows = choice["prompt_logprobs"][1:]
        got = [rows[i][str(ids[i + 1])]["logprob"] for i in range(len(ids) - 1)]
        assert np.abs(np.array(got) - expected[np.arange(len(ids) - 1), ids[1:]]).max() < TOLERANCE


def test_a_served_prefix_is_never_computed_again(server: EmbeddedServer, reference: Any) -> None:
    tokens = _prompt(np.random.default_rng(2), 60)
    for extra, computed in ((0, 58), (1, 1), (2, 1)):
        prompt = tokens[: 58 + extra]
        before = _metrics(server)
        answer = _complete(server, prompt, logprobs=VOCAB)
        after = _metrics(server)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - computed
        assert after["vllm:iteration_tokens_total_sum"] - before["vllm:iteration_tokens_total_sum"] == computed
        assert after["vllm:prefix_cache_hits_total"] - before["vllm:prefix_cache_hits_total"] == len(prompt) - computed
        got = _vector(answer["choices"][0]["logprobs"]["top_logprobs"][0])
        assert np.abs(got - _expected(reference, prompt)[-1]).max() < TOLERANCE


def test_forks_share_the_prefix_and_stay_apart(server: EmbeddedServer, reference: Any) -> None:
    rng = np.random.default_rng(3)
    prefix = _prompt(rng, 50)
    _complete(server, prefix)
    branches = [prefix + _prompt(rng, length) for length in (1, 1, 5, 3)]
    before = _metrics(server)["vllm:iteration_tokens_total_sum"]
    answer = _complete(server, branches, max_tokens=4, logprobs=VOCAB, ignore_eos=True)
    computed = _metrics(server)["vllm:iteration_tokens_total_sum"] - before
    assert computed == 1 + 1 + 5 + 3 + 4 * 3
    for branch, choice in zip(branches, answer["choices"], strict=True):
        expected = _expected(reference, branch + choice["token_ids"])[len(branch) - 1 : -1]
        got = np.stack([_vector(entry) for entry in choice["logprobs"]["top_logprobs"]])
        assert np.abs(got - expected).max() < TOLERANCE


def test_identical_prompts_and_prefixes_in_one_request_are_computed_once(
    server: EmbeddedServer, reference: Any
) -> None:
    tokens = _prompt(np.random.default_rng(4), 30)
    prompts = [tokens[:length] for length in (26, 30, 27, 30, 28, 29)]
    before = _metrics(server)["vllm:iteration_tokens_total_sum"]
    answer = _complete(server, prompts, logprobs=VOCAB)
    assert _metrics(server)["vllm:iteration_tokens_total_sum"] - before == 30
    expected = _expected(reference, tokens)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        got = _vector(choice["logprobs"]["top_logprobs"][0])
        assert np.abs(got - expected[len(prompt) - 1]).max() < TOLERANCE


def test_followers_of_a_shared_prompt_continue_correctly(server: EmbeddedServer, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(5), 33)
    answer = _complete(server, [prompt] * 5, max_tokens=8, logprobs=VOCAB, ignore_eos=True)
    outputs = [tuple(choice["token_ids"]) for choice in answer["choices"]]
    assert len(set(outputs)) > 1
    for choice in answer["choices"]:
        expected = _expected(reference, prompt + choice["token_ids"])[len(prompt) - 1 : -1]
        got = np.stack([_vector(entry) for entry in choice["logprobs"]["top_logprobs"]])
        assert np.abs(got - expected).max() < TOLERANCE


def test_eviction_keeps_answers_right(model_dir: Path, reference: Any) -> None:
    rng = np.random.default_rng(6)
    # Room for about 3 full sequences.
    flags = ["--max-logprobs", "-1", "--max-model-len", "128", "--kv-cache-gib", "0.0004"]
    prompts = [_prompt(rng, length) for length in (100, 90, 20, 110, 64, 65, 3, 100)]
    with WarmServer(model_dir, flags, env=ENV) as small:
        for _ in range(2):
            answer = _complete(small, prompts, max_tokens=10, logprobs=VOCAB, ignore_eos=True)
            for prompt, choice in zip(prompts, answer["choices"], strict=True):
                expected = _expected(reference, prompt + choice["token_ids"])[len(prompt) - 1 : -1]
                got = np.stack([_vector(entry) for entry in choice["logprobs"]["top_logprobs"]])
                assert np.abs(got - expected).max() < TOLERANCE
        hits = _metrics(small)["vllm:prefix_cache_hits_total"]
    assert hits < sum(len(prompt) - 1 for prompt in prompts), "everything was still cached: nothing was evicted"


# Sampling


def test_same_seed_same_tokens_whatever_else_runs(server: EmbeddedServer) -> None:
    rng = np.random.default_rng(7)
    prompt, others = _prompt(rng, 12), [_prompt(rng, 5) for _ in range(6)]
    alone = _complete(server, prompt, max_tokens=16, seed=11)["choices"][0]["token_ids"]
    among = _complete(server, [*others, prompt], max_tokens=16, seed=11)["choices"][-1]["token_ids"]
    different = _complete(server, prompt, max_tokens=16, seed=12)["choices"][0]["token_ids"]
    assert alone == among
    assert alone != different


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_follow_the_model(model_dir: Path, reference: Any, temperature: float) -> None:
    """Chi-square over tokens expected at least 8 times, the rest pooled; false alarms: 1e-4; fixed seed."""
    prompt, draws = _prompt(np.random.default_rng(8), 9), 4000
    with WarmServer(model_dir, ["--seed", "5"], env=ENV) as server:
        answers = [_complete(server, [prompt] * 1000, temperature=temperature) for _ in range(draws // 1000)]
    tokens = [choice["token_ids"][0] for answer in answers for choice in answer["choices"]]
    logits = _expected(reference, prompt)[-1].astype(np.float64) / temperature
    probs = np.exp(logits - np.logaddexp.reduce(logits))
    counts = np.bincount(tokens, minlength=VOCAB)
    large = probs * draws >= 8
    observed = np.append(counts[large], counts[~large].sum())
    expected = np.append(probs[large], probs[~large].sum()) * draws
    statistic, freedom = ((observed - expected) ** 2 / expected).sum(), len(observed) - 1
    # Wilson-Hilferty: the cube root of a chi-square over its degrees of freedom is nearly normal.
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / np.sqrt(2 / (9 * freedom))
    assert z < 3.72
    assert large.sum() > 5


def test_logit_bias_excludes_and_forces(server: EmbeddedServer, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(9), 9)
    expected = _expected(reference, prompt)[-1]
    top = np.argsort(-expected)[:3].tolist()
    excluded = _complete(server, prompt, temperature=0, logprobs=1, logit_bias={str(top[0]): -100, top[1]: -1000})
    choice = excluded["choices"][0]
    assert choice["token_ids"] == [top[2]]
    # Reported log-probabilities are the model's own: the excluded token is still the most likely one.
    assert f"token_id:{top[0]}" in choice["logprobs"]["top_logprobs"][0]
    assert abs(choice["logprobs"]["token_logprobs"][0] - expected[top[2]]) < TOLERANCE
    assert _complete(server, prompt, logit_bias={"17": 100})["choices"][0]["token_ids"] == [17]


def test_processed_logprobs_are_those_of_the_sampled_distribution(model_dir: Path, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(10), 9)
    raw = _expected(reference, prompt)[-1].astype(np.float64)
    flags = ["--max-logprobs", "-1", "--logprobs-mode", "processed_logprobs"]
    with WarmServer(model_dir, flags, env=ENV) as processed:
        for temperature, divisor in ((0.5, 0.5), (0, 1.0)):
            answer = _complete(processed, prompt, logprobs=VOCAB, temperature=temperature, logit_bias={"3": 4})
            logits = raw + 4 * (np.arange(VOCAB) == 3)
            expected = logits / divisor - np.logaddexp.reduce(logits / divisor)
            got = _vector(answer["choices"][0]["logprobs"]["top_logprobs"][0])
            assert np.abs(got - expected).max() < TOLERANCE


def test_greedy_takes_the_mode_and_stops_where_told(server: EmbeddedServer, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(11), 9)
    greedy = _complete(server, prompt, temperature=0, max_tokens=6, ignore_eos=True)["choices"][0]
    tokens = list(prompt)
    for token in greedy["token_ids"]:
        assert token == int(_expected(reference, tokens)[-1].argmax())
        tokens.append(token)
    assert greedy["finish_reason"] == "length"
    second = greedy["token_ids"][1]
    stopped = _complete(server, prompt, temperature=0, max_tokens=6, stop_token_ids=[second])["choices"][0]
    assert stopped["token_ids"] == greedy["token_ids"][: greedy["token_ids"].index(second) + 1]
    assert stopped["finish_reason"] == "stop"
    until_eos = _complete(server, prompt, max_tokens=6, logit_bias={str(EOS): 100})["choices"][0]
    assert (until_eos["token_ids"], until_eos["finish_reason"]) == ([EOS], "stop")
    assert until_eos["text"] == ""
    past_eos = _complete(server, prompt, max_tokens=3, logit_bias={str(EOS): 100}, ignore_eos=True)["choices"][0]
    assert (past_eos["token_ids"], past_eos["finish_reason"]) == ([EOS] * 3, "length")


# Shapes of answers


def test_lists_hold_the_most_likely_tokens_and_the_sampled_one(server: EmbeddedServer, reference: Any) -> None:
    prompt = _prompt(np.random.default_rng(12), 9)
    best = np.argsort(-_expected(reference, prompt)[-1])[:4].tolist()
    rare = int(np.argmin(_expected(reference, prompt)[-1]))
    entry = _complete(server, prompt, logprobs=4, logit_bias={str(rare): 100})["choices"][0]["logprobs"]
    assert list(entry["top_logprobs"][0]) == [f"token_id:{i}" for i in [rare, *best]]
    assert entry["tokens"] == [f"token_id:{rare}"]
    named = _complete(server, prompt, logprobs=1, logprob_token_ids=[5, 6, 200], logit_bias={str(rare): 100})
    assert list(named["choices"][0]["logprobs"]["top_logprobs"][0]) == [f"token_id:{i}" for i in (rare, 5, 6, 200)]
    vector = _vector(named["choices"][0]["logprobs"]["top_logprobs"][0])
    expected = _expected(reference, prompt)[-1]
    assert np.abs(vector[[rare, 5, 6, 200]] - expected[[rare, 5, 6, 200]]).max() < TOLERANCE


def test_prompt_forms_and_text(server: EmbeddedServer) -> None:
    status, tokenized = _call(server, "/tokenize", {"prompt": "what is the user"})
    assert status == 200 and tokenized["count"] == len(tokenized["tokens"]) < len("what is the user")
    assert tokenized["max_model_len"] == 256
    assert _call(server, "/detokenize", {"tokens": tokenized["tokens"]})[1] == {"prompt": "what is the user"}
    forms = ["what is the user", ["what is the user"], tokenized["tokens"], [tokenized["tokens"]]]
    answers = [_complete(server, form, temperature=0, max_tokens=5)["choices"] for form in forms]
    assert all(len(choices) == 1 for choices in answers)
    assert len({tuple(choices[0]["token_ids"]) for choices in answers}) == 1
    assert all(choices[0]["prompt_token_ids"] == tokenized["tokens"] for choices in answers)


def test_generate_returns_rows_of_uncached_tokens_only(server: EmbeddedServer, reference: Any) -> None:
    tokens = _prompt(np.random.default_rng(13), 70)
    expected = _expected(reference, tokens)
    _complete(server, tokens[:50])

    def score(**fields: Any) -> dict[str, Any]:
        body = {
            "token_ids": tokens,
            "sampling_params": {"max_tokens": 1, "temperature": 0, **fields},
        }
        status, answer = _call(server, "/inference/v1/generate", body)
        assert status == 200, answer
        return answer

    partial = score(prompt_logprobs=2, skip_reading_prefix_cache=False)
    # 50 tokens are cached, in whole blocks of 16: rows for tokens 49..69, after the null of the first token.
    assert partial["usage"]["prompt_tokens_details"]["cached_tokens"] == 48
    rows = partial["prompt_logprobs"]
    assert rows[0] is None and len(rows) == 1 + 21
    full = score(prompt_logprobs=2)["prompt_logprobs"]
    assert full[0] is None and len(full) == 70
    for offset, row in enumerate(reversed(rows[1:])):
        position = 69 - offset
        assert row.keys() == full[position].keys()
        for key, entry in row.items():
            assert abs(entry["logprob"] - expected[position - 1, int(key)]) < TOLERANCE
    assert partial["choices"][0]["token_ids"] == [expected[-1].argmax()]


def test_generate_scores_named_tokens_as_npy(server: EmbeddedServer, reference: Any) -> None:
    tokens = _prompt(np.random.default_rng(14), 40)
    expected = _expected(reference, tokens)
    named = [[[7, 3, 250], [], [11], [5, -1, 6]][row % 4] for row in range(39)]  # one list per row

    def ask(start: int | None, skip: bool | None, names: object, **more: object) -> tuple[int, object]:
        sampling = {"max_tokens": 1, "prompt_logprob_token_ids": names, "prompt_logprob_start": start, **more}
        body = {"token_ids": tokens, "sampling_params": {**sampling, "skip_reading_prefix_cache": skip}}
        return _call(server, "/inference/v1/generate", body)

    def scores(start: int | None, skip: bool | None, **more: object) -> np.ndarray | None:
        status, answer = ask(start, skip, named[start or 0 :], **more)
        assert status == 200, answer
        encoded = answer["prompt_token_id_logprobs"]
        return None if encoded is None else np.load(io.BytesIO(base64.b64decode(encoded)))

    for start, skip, more in ((None, None, {}), (30, None, {"prompt_logprobs": 1}), (36, False, {})):
        got = scores(start, skip, **more)
        assert got is not None and got.dtype == np.float32 and got.shape == (39 - (start or 0), 3)
        for row, values in enumerate(got, start=start or 0):
            wanted = [expected[row, name] if name >= 0 else -np.inf for name in (*named[row], -1, -1, -1)[:3]]
            np.testing.assert_allclose(values, wanted, atol=TOLERANCE)
    assert scores(20, False) is None  # rows 20..31 are cached and were not computed
    for names, problem in (
        ([7, 3], "list of lists"),
        (named, "39 rows, but the prompt has 9"),
        ([[]] * 9, "non-empty"),
        ([[10**6]] * 9, "out-of-vocab"),
    ):
        status, answer = ask(30, None, names)
        assert status == 400 and problem in str(answer)


def test_models_version_health(server: EmbeddedServer) -> None:
    assert _call(server, "/health") == (200, "")
    assert "dual_rollout" in _call(server, "/version")[1]["version"]
    card = _call(server, "/v1/models")[1]["data"][0]
    assert (card["id"], card["max_model_len"]) == ("tiny", 256)


# Concurrency


def test_concurrent_requests_share_steps(server: EmbeddedServer) -> None:
    rng = np.random.default_rng(15)
    prompts = [_prompt(rng, 10) for _ in range(12)]
    before = _metrics(server)
    with ThreadPoolExecutor(12) as pool:
        list(pool.map(lambda p: _complete(server, p, max_tokens=60, ignore_eos=True), prompts))
    after = _metrics(server)
    steps = after["vllm:iteration_tokens_total_count"] - before["vllm:iteration_tokens_total_count"]
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 12 * 60
    assert steps < 12 * 60 / 2


def test_more_sequences_than_fit_wait_their_turn(model_dir: Path) -> None:
    rng = np.random.default_rng(16)
    with WarmServer(model_dir, ["--max-num-seqs", "3"], env=ENV) as narrow:
        answer = _complete(narrow, [_prompt(rng, 4) for _ in range(10)], max_tokens=7, ignore_eos=True)
        assert [len(choice["token_ids"]) for choice in answer["choices"]] == [7] * 10
        # At most 3 tokens a step once the prompts are in.
        assert _metrics(narrow)["vllm:iteration_tokens_total_count"] >= 10 * 7 / 3


# Errors

ERRORS: list[tuple[dict[str, Any], int, str, str]] = [
    ({"model": "nope"}, 404, "NotFoundError", "The model `nope` does not exist."),
    ({"prompt": [1] * 257}, 400, "BadRequestError", "maximum context length is 256"),
    ({"prompt": [1] * 250, "max_tokens": 7}, 400, "BadRequestError", "for a total of 257 tokens"),
    ({"max_tokens": 257}, 400, "BadRequestError", "max_tokens=257 cannot be greater than max_model_len=256"),
    ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens must be at least 1, got 0."),
    ({"max_tokens": "many"}, 400, "Bad Request", "valid integer"),
    ({"logprobs": 301}, 400, "BadRequestError", "Requested sample logprobs of 301"),
    ({"logprobs": -2}, 400, "BadRequestError", "`logprobs` must be a positive value or -1."),
    ({"logprobs": "5"}, 400, "BadRequestError", "`logprobs` must be an integer."),
    ({"prompt_logprobs": 301}, 400, "BadRequestError", "Requested prompt logprobs of 301"),
    ({"logprob_token_ids": [1]}, 400, "BadRequestError", "`logprobs` must be set"),
    ({"logprob_token_ids": [1] * 129, "logprobs": 1}, 400, "BadRequestError", "max allowed: 128"),
    ({"logprob_token_ids": [VOCAB], "logprobs": 1}, 400, "BadRequestError", "out-of-vocab"),
    ({"logit_bias": {"abc": 1}}, 400, "BadRequestError", "cannot be converted to integer token IDs"),
    ({"logit_bias": {str(VOCAB): 1}}, 400, "BadRequestError", "out-of-vocab"),
    ({"stop_token_ids": [-1]}, 400, "BadRequestError", "out-of-vocab"),
    ({"prompt": [-1, 2]}, 400, "Bad Request", "greater than or equal to 0"),
    ({"prompt": [1, VOCAB]}, 400, "BadRequestError", f"Token id {VOCAB} is out of vocabulary"),
    ({"prompt": []}, 400, "BadRequestError", "at least one prompt"),
    ({"ignore_eos": "perhaps"}, 400, "Bad Request", "valid boolean"),
    ({"prompt": [[]]}, 400, "BadRequestError", "cannot be empty"),
    ({"prompt": ""}, 400, "BadRequestError", "Either prompt or prompt_embeds must be provided"),
    ({"prompt": 5}, 400, "Bad Request", "prompt"),
    ({"prompt": [1, "a"]}, 400, "Bad Request", "valid integer"),
    ({"temperature": -1}, 400, "BadRequestError", "temperature must be non-negative"),
    ({"temperature": 3}, 400, "BadRequestError", "temperature must be in [0, 2]"),
    ({"temperature": "hot"}, 400, "Bad Request", "valid number"),
    ({"n": 2}, 400, "BadRequestError", "n=2 is not supported by the embedded server"),
    ({"min_tokens": 2}, 400, "BadRequestError", "min_tokens=2 is not supported"),
    ({"top_p": 0.9}, 400, "BadRequestError", "top_p=0.9 is not supported by the embedded server"),
    ({"top_k": 5}, 400, "BadRequestError", "top_k=5 is not supported"),
    ({"stream": True}, 400, "BadRequestError", "stream=True is not supported"),
    ({"echo": True}, 400, "BadRequestError", "echo=True is not supported"),
    ({"stop": ["x"]}, 400, "BadRequestError", "stop=['x'] is not supported"),
]


@pytest.mark.parametrize(("fields", "status", "kind", "message"), ERRORS)
def test_errors_have_vllms_shape(
    server: EmbeddedServer, fields: dict[str, Any], status: int, kind: str, message: str
) -> None:
    got, answer = _call(server, "/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 1, **fields})
    assert got == status, answer
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (error["code"], error["type"]) == (status, kind)
    assert message in error["message"]


def test_neutral_and_unknown_fields_are_accepted(server: EmbeddedServer) -> None:
    neutral = {
        "top_p": 1,
        "top_k": -1,
        "min_p": 0,
        "stream": False,
        "echo": False,
        "stop": [],
        "frobnicate": 3,
    }
    assert len(_complete(server, [1, 2], **neutral)["choices"]) == 1


def test_broken_bodies(server: EmbeddedServer) -> None:
    for raw in (b"{nope", b"", b"[1, 2]", b'"text"'):
        status, answer = _call(server, "/v1/completions", raw=raw)
        assert (status, answer["error"]["code"], answer["error"]["type"]) == (400, 400, "Bad Request")
    assert _call(server, "/v1/nothing")[0] == 404
    assert _call(server, "/v1/completions")[0] == 405
    assert _call(server, "/inference/v1/generate", {"token_ids": [], "sampling_params": {}})[0] == 400
    assert _call(server, "/inference/v1/generate", {"token_ids": [1]})[0] == 400
    status, answer = _call(server, "/inference/v1/generate", {"token_ids": [1] * 256, "sampling_params": {}})
    assert status == 400 and "longer than the maximum model length" in answer["error"]["message"]


# New weights and adapters


def test_reload_weights_is_all_or_nothing(model_dir: Path, other_dir: Path, reference: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(17)
    prompt, bad = _prompt(rng, 30), make_tiny_model(tmp_path / "bad", hidden_size=32)
    old, new = _expected(reference, prompt)[-1], _expected(_load(other_dir), prompt)[-1]
    assert np.abs(old - new).max() > 0.1

    with WarmServer(model_dir, ["--max-logprobs", "-1"], env=ENV) as server:

        def served() -> np.ndarray:
            return _vector(_complete(server, prompt, logprobs=VOCAB)["choices"][0]["logprobs"]["top_logprobs"][0])

        def reload(path: Path) -> tuple[int, Any]:
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
            return _call(server, "/collective_rpc", body)

        assert np.abs(served() - old).max() < TOLERANCE
        for wrong in (bad, tmp_path / "missing"):
            status, answer = reload(wrong)
            assert status == 500 and "collective_rpc method failed" in answer["error"]["message"]
            assert np.abs(served() - old).max() < TOLERANCE
        assert reload(other_dir) == (200, {"results": [None]})
        assert np.abs(served() - new).max() < TOLERANCE
        assert _call(server, "/reset_prefix_cache", {}) == (200, {"success": True})
        answer = _complete(server, prompt, logprobs=VOCAB)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_requests_running_during_a_reload_finish_on_the_new_weights(
    model_dir: Path, other_dir: Path, reference: Any
) -> None:
    prompt = _prompt(np.random.default_rng(18), 20)
    models = (reference, _load(other_dir))
    with (
        WarmServer(model_dir, ["--max-logprobs", "-1"], env=ENV) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        fields = {"max_tokens": 450, "logprobs": VOCAB, "ignore_eos": True, "seed": 1}
        running = pool.submit(_complete, server, prompt, **fields)
        while _metrics(server)["vllm:generation_tokens_total"] < 20:
            time.sleep(0.005)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(other_dir)}}
        assert _call(server, "/collective_rpc", body)[0] == 200
        assert not running.done(), "the request ended before the reload: nothing was tested"
        choice = running.result()["choices"][0]
    tokens = prompt + choice["token_ids"]
    got = np.stack([_vector(entry) for entry in choice["logprobs"]["top_logprobs"]])
    errors = [np.abs(got - _expected(model, tokens)[19:-1]).max(axis=1) for model in models]
    switch = int(np.argmax(errors[0] > TOLERANCE))
    # Every token comes from exactly one set of weights, over keys and values of the same weights.
    assert switch >= 20 and errors[0][:switch].max() < TOLERANCE and errors[1][switch:].max() < TOLERANCE


def test_lora_adapters(model_dir: Path, reference: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    prompt = _prompt(np.random.default_rng(19), 25)
    adapters, expected = [], []
    for number in range(2):
        torch.manual_seed(number)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
        adapted = peft.get_peft_model(_load(model_dir), config).eval()
        adapters.append(tmp_path / f"adapter{number}")
        adapted.save_pretrained(adapters[-1])
        expected.append(_expected(adapted, prompt)[-1])
    wrong = {tmp_path / "misfit": "size mismatch", tmp_path / "part": "missing", tmp_path / "whole": "whole modules"}
    wrong |= {tmp_path / "ia3": "type IA3", tmp_path / "broken": "broken safetensors"}
    wide = _load(make_tiny_model(tmp_path / "wide", hidden_size=32))
    peft.get_peft_model(wide, peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "misfit")
    whole = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    peft.get_peft_model(_load(model_dir), whole).save_pretrained(tmp_path / "whole")
    ia3 = peft.IA3Config(target_modules=["v_proj"], feedforward_modules=[])
    peft.get_peft_model(_load(model_dir), ia3).save_pretrained(tmp_path / "ia3")
    for name in ("part", "broken"):
        shutil.copytree(adapters[0], tmp_path / name)
    tensors = load_file(adapters[0] / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, tmp_path / "part/adapter_model.safetensors")
    (tmp_path / "broken/adapter_model.safetensors").write_bytes(b"nothing")
    base = _expected(reference, prompt)[-1]
    assert min(np.abs(base - e).max() for e in expected) > 0.1

    flags = ["--max-logprobs", "-1", "--enable-lora", "--served-model-name", "tiny"]
    with WarmServer(model_dir, flags, env=ENV) as server:

        def error(model: str, distribution: np.ndarray) -> float:
            answer = _complete(server, prompt, logprobs=VOCAB, model=model)
            assert answer["model"] == model
            return float(np.abs(_vector(answer["choices"][0]["logprobs"]["top_logprobs"][0]) - distribution).max())

        def load(path: Path, **fields: Any) -> tuple[int, Any]:
            return _call(server, "/v1/load_lora_adapter", {"lora_name": "ad", "lora_path": str(path), **fields})

        assert error("tiny", base) < TOLERANCE
        assert load(tmp_path / "missing")[0] == 404
        for folder, why in wrong.items():
            status, answer = load(folder)
            assert status == 500 and why in answer["error"]["message"]
            assert error("tiny", base) < TOLERANCE
        assert load(adapters[0])[0] == 200
        assert error("ad", expected[0]) < TOLERANCE
        assert error("tiny", base) < TOLERANCE
        assert load(adapters[1])[0] == 400
        assert load(adapters[1], load_inplace=True)[0] == 200
        assert error("ad", expected[1]) < TOLERANCE
        with ThreadPoolExecutor(4) as pool:
            distributions = [("ad", expected[1]), ("tiny", base)] * 4
            assert max(pool.map(lambda pair: error(*pair), distributions)) < TOLERANCE
        assert [card["id"] for card in _call(server, "/v1/models")[1]["data"]] == ["tiny", "ad"]
        other = perturbed_copy(model_dir, tmp_path / "other", noise=0.3, seed=3)
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(other)}}
        assert _call(server, "/collective_rpc", body)[0] == 200
        assert error("tiny", _expected(_load(other), prompt)[-1]) < TOLERANCE
        moved = _expected(peft.PeftModel.from_pretrained(_load(other), adapters[1]).eval(), prompt)[-1]
        assert error("ad", moved) < TOLERANCE
        assert _call(server, "/v1/unload_lora_adapter", {"lora_name": "ad"})[0] == 200
        assert _call(server, "/v1/completions", {"prompt": [1], "model": "ad"})[0] == 404
        assert error("tiny", _expected(_load(other), prompt)[-1]) < TOLERANCE


# Life cycle


def test_a_taken_port_is_reported_before_the_model_is_loaded(model_dir: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = str(holder.getsockname()[1])
        command = [sys.executable, "-m", "dual_rollout.cli", "serve", "/nowhere", "--port", port]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANG)
    assert done.returncode != 0
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_proxy_is_not_asked_whether_a_server_has_started(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    with WarmServer(model_dir, env=ENV):
        pass


def test_models_that_cannot_be_served_are_refused(model_dir: Path, tmp_path: Path) -> None:
    for flags, message in (
        (["--max-model-len", "100000"], "max_position_embeddings"),
        (["--kv-cache-gib", "0.00001"], "--kv-cache-gib"),
    ):
        with pytest.raises(EngineUnavailableError, match=message):
            WarmServer(model_dir, flags, env=ENV).start()
    with pytest.raises(EngineUnavailableError, match="is not a folder"):
        EmbeddedServer(tmp_path / "nothing", env=ENV).start()


def _unfinished(server: EmbeddedServer) -> float:
    metrics = _metrics(server)
    return metrics["vllm:num_requests_running"] + metrics["vllm:num_requests_waiting"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_the_server_before_its_work_is_done(model_dir: Path, number: int) -> None:
    """It works on twice `--max-num-seqs` requests at once; the other two wait their turn, and get no answer but 503."""
    body = {"prompt": [[i, 1, 2] for i in range(60)], "max_tokens": 500, "ignore_eos": True}
    with EmbeddedServer(model_dir, ["--max-num-seqs", "2"], env=ENV) as server, ThreadPoolExecutor(6) as clients:
        assert server.process is not None
        answers = [clients.submit(_call, server, "/v1/completions", body) for _ in range(6)]
        while (unfinished := _unfinished(server)) <= 3 * 60:
            time.sleep(0.01)
        assert unfinished <= 4 * 60 and _unfinished(server) <= 4 * 60
        assert _call(server, "/health")[0] == 200 and not any(answer.done() for answer in answers)
        server.process.send_signal(number)
        assert server.process.wait(HANG) == 0
        told = [answer.exception(100) or answer.result()[0] for answer in answers]
    # A step that takes longer than the server waits leaves its clients without an answer.
    assert all(status == 503 or isinstance(status, OSError) for status in told), told
