"""What an engine must do, the same for every server: the embedded one, real vLLM and SGLang's stub answer alike.

The reference is a plain forward pass of transformers in this process, so two servers that agree with it agree with
each other: log-probabilities to `CLOSE` nats, token ids exactly.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from dual_rollout.exceptions import EngineError, EngineProtocolError, EngineRejectedError, EngineUnavailableError
from dual_rollout.functional.top_k import NO_TOKEN, TopK
from dual_rollout.servers import Engine, HttpTransport, VLLMEngine
from tests.hang import HANG

T = TypeVar("T")

CLOSE = 1e-3
MAX_LOGPROBS = 200
MAX_MODEL_LEN = 512
PROMPTS = [[10, 20, 30], [200, 7], list(range(40, 110)), [5]]
DRAFTS = [np.array([3, 250, 17, 9]), np.array([1]), np.array([60, 61]), np.array([4, 4, 4, 4, 4])]


@dataclass(frozen=True)
class Target:
    """A server for `model` with `MAX_LOGPROBS` and `MAX_MODEL_LEN`, and one, perhaps the same, that loads adapters.

    `other` is a model of the same shape, for the server to load; `engine` makes its client.
    """

    url: str
    lora_url: str | None
    model: Path
    other: Path
    engine: Callable[..., Engine] = VLLMEngine

    @property
    def with_lora(self) -> Target:
        if self.lora_url is None:
            pytest.skip("no server loads adapters")
        return replace(self, url=self.lora_url)


class EngineConformance:
    """Subclasses give a fixture `target`. A test that changes a server's weights puts them back."""

    accepts: Collection[str] = ()
    """Requests, by the names below, that this server can answer though others cannot."""
    slower_scoring: Collection[str] = ("prompt_logprobs",)
    """Ways to score drafts that it has besides those that the probe names, which are only the promising ones."""
    absent_adapter = "does not see"

    # ---- what it says of itself

    def test_health(self, target: Target) -> None:
        assert use(target, lambda engine: engine.health()) is None

    def test_the_probe_finds_what_the_server_was_started_with(self, target: Target) -> None:
        found = use(target, lambda engine: engine.probe([1, 2]))
        assert found.root == str(target.model)
        assert found.version
        assert (found.max_logprobs, found.max_model_len) == (MAX_LOGPROBS, MAX_MODEL_LEN)
        assert found.vocab_size == reference(target.model).config.vocab_size
        assert (found.logprobs_mode, found.prefix_caching, found.named_logprobs) == ("raw", True, True)
        assert found.generate_endpoint and found.detokenizes
        assert found.reloads_weights and found.resets_prefix_cache and found.prompt_lists

    def test_the_probe_finds_that_adapters_can_be_loaded(self, target: Target) -> None:
        assert use(target.with_lora, lambda engine: engine.probe([1, 2])).loads_lora

    def test_probing_costs_little_and_happens_once(self, target: Target) -> None:
        async def ask(engine: Engine) -> int:
            await asyncio.gather(*(engine.probe([1, 2]) for _ in range(3)))
            return engine._http.stats.requests  # type: ignore[attr-defined]

        found = use(target, ask)
        # Two of them to know the server again (its start time, what it says), one for sessions.
        assert found <= 24, found

    # ---- next tokens

    @pytest.mark.parametrize("k", [1, 20, 200])
    def test_next_top_k_of_a_batch(self, target: Target, k: int) -> None:
        top = use(target, lambda engine: engine.next_top_k(PROMPTS, k))
        assert_lists(top, [distribution(target.model, prompt) for prompt in PROMPTS], k)

    def test_tempered_lists_keep_their_proportions(self, target: Target) -> None:
        top = use(target, lambda engine: engine.next_top_k(PROMPTS, 200, 0.7))
        for prompt, ids, logprobs in zip(PROMPTS, top.token_ids, top.logprobs, strict=True):
            tempered = (torch.tensor(distribution(target.model, prompt)) / 0.7).log_softmax(0).numpy()
            np.testing.assert_allclose(logprobs, tempered[ids], atol=0.02)  # the unlisted mass is bounded, not known
            np.testing.assert_allclose(np.ptp(logprobs), np.ptp(tempered[ids]), atol=CLOSE)

    def test_a_list_of_more_prompts_than_a_request_may_have(self, target: Target) -> None:
        prompts = [[i % 250] for i in range(1030)]
        top = use(target, lambda engine: engine.next_top_k(prompts, 1))
        best = {i: int(distribution(target.model, [i]).argmax()) for i in range(250)}
        assert top.token_ids[:, 0].tolist() == [best[prompt[0]] for prompt in prompts]

    def test_named_logprobs(self, target: Target) -> None:
        vocabulary = reference(target.model).config.vocab_size
        names = [[7, 3, 250], [1], list(range(vocabulary)), []]
        rows = use(target, lambda engine: engine.named_logprobs(PROMPTS, names))
        for prompt, ids, row in zip(PROMPTS, names, rows, strict=True):
            np.testing.assert_allclose(row, distribution(target.model, prompt)[np.array(ids, dtype=int)], atol=CLOSE)

    def test_lists_and_named_tokens_at_once_do_not_disturb_each_other(self, target: Target) -> None:
        async def ask(engine: Engine) -> tuple[list[TopK], list[list[np.ndarray]]]:
            lists = [engine.next_top_k(PROMPTS, 20) for _ in range(8)]
            named = [engine.named_logprobs(PROMPTS, [[7, 3]] * 4) for _ in range(8)]
            results = await asyncio.gather(*(call for pair in zip(lists, named, strict=True) for call in pair))
            return results[::2], results[1::2]

        distributions = [distribution(target.model, prompt) for prompt in PROMPTS]
        for top, rows in zip(*use(target, ask), strict=True):
            assert_lists(top, distributions, 20)
            np.testing.assert_allclose(rows, [logprobs[[7, 3]] for logprobs in distributions], atol=CLOSE)

    def test_draws_avoid_excluded_tokens_and_repeat_with_their_seed(self, target: Target) -> None:
        likely = np.argsort(-distribution(target.model, PROMPTS[0]))[:30].tolist()

        async def ask(engine: Engine) -> list[int]:
            seeds = [*range(20), *range(20)]
            return await engine.draw_excluding([PROMPTS[0]] * 40, [likely] * 40, 1.0, seeds)

        tokens = use(target, ask)
        assert not set(tokens) & set(likely)
        assert tokens[:20] == tokens[20:]
        assert len(set(tokens)) > 5

    # ---- drafts

    def test_drafts_come_with_the_lists_they_were_drawn_from(self, target: Target) -> None:
        lengths = [6, 1, 4, 8]
        drafts = use(target, lambda engine: engine.draft(PROMPTS, lengths, 20, 1.0, [11, 12, 13, 14]))
        assert all(1 <= len(tokens) <= length for tokens, length in zip(drafts.token_ids, lengths, strict=True))
        assert_lists(drafts.lists, distributions_along(target.model, PROMPTS, drafts.token_ids), 20)

    def test_drafts_follow_their_seeds(self, target: Target) -> None:
        def draft(seeds: list[int]) -> list[list[int]]:
            drafts = use(target, lambda engine: engine.draft([[9, 8]] * 3, [8] * 3, 5, 1.0, seeds))
            return [tokens.tolist() for tokens in drafts.token_ids]

        first = draft([1, 2, 3])
        assert draft([3, 1, 4])[:2] == [first[2], first[0]]
        assert len({str(tokens) for tokens in first}) == 3

    def test_drafts_end_with_the_first_stop_id(self, target: Target) -> None:
        prompts, lengths, seeds = [[9, 8], [1, 2, 3]], [12, 12], [1, 2]

        async def ask(engine: Engine) -> list[list[list[int]]]:
            await engine.probe([1, 2])
            whole = await engine.draft(prompts, lengths, 5, 1.0, seeds)
            # One of them is no token of the model.
            stop_ids = {int(whole.token_ids[0][4]), int(whole.token_ids[1][2]), 10**6}
            ended = await engine.draft(prompts, lengths, 5, 1.0, seeds, stop_ids)
            return [[tokens.tolist() for tokens in drafts.token_ids] for drafts in (whole, ended)]

        whole, ended = use(target, ask)
        stop_ids = {whole[0][4], whole[1][2]}
        for tokens, cut in zip(whole, ended, strict=True):
            assert cut == tokens[: 1 + next(i for i, token in enumerate(tokens) if token in stop_ids)]

    @pytest.mark.parametrize("method", ["prefixes", "prompt_logprobs", "token_ids"])
    def test_drafts_are_scored_alike_by_every_method(self, target: Target, method: Any) -> None:
        promising = use(target, lambda engine: engine.probe([1, 2])).scoring
        if method not in {*promising, *self.slower_scoring}:
            pytest.skip("this server cannot")
        longer = [[*prompt, *draft.tolist()] for prompt, draft in zip(PROMPTS, DRAFTS, strict=True)]

        async def ask(engine: Engine) -> list[TopK]:
            # The second time, the prefix cache has the drafts too, and the third what comes before the next block.
            return [
                await engine.score_drafts(prompts, DRAFTS, 20, 1.0, method) for prompts in (PROMPTS, PROMPTS, longer)
            ]

        for prompts, top in zip((PROMPTS, PROMPTS, longer), use(target, ask), strict=True):
            assert_lists(top, distributions_along(target.model, prompts, DRAFTS), 20)

    def test_named_tokens_are_scored_along_drafts(self, target: Target) -> None:
        """By name in one request per draft where the probe finds that it can be done, else prefix by prefix."""
        vocabulary = reference(target.model).config.vocab_size
        names: list[list[int]] = [[7], [], [3, 9, 250], [1], list(range(vocabulary)), [], [], [5], [], [2, 4], [], []]
        distributions = distributions_along(target.model, PROMPTS, DRAFTS)

        async def ask(engine: Engine) -> list[list[np.ndarray]]:
            await engine.probe([1, 2])
            before = engine._http.stats.requests  # type: ignore[attr-defined]
            rows = [await engine.score_named(PROMPTS, DRAFTS, names) for _ in range(2)]
            if (await engine.probe([1, 2])).named_rows:
                # One for each draft with names, two for all of the vocabulary, and again what the cache had rows of.
                assert engine._http.stats.requests - before <= 2 * 2 * 5  # type: ignore[attr-defined]
            return rows

        for rows in use(target, ask):
            for expected, ids, row in zip(distributions, names, rows, strict=True):
                np.testing.assert_allclose(row, expected[np.array(ids, dtype=int)], atol=CLOSE)

    def test_rows_that_the_prefix_cache_holds_are_asked_for_again(self, target: Target) -> None:
        """A draft over the end of a block of the cache; once scored, its first tokens are in the cache."""
        prompts, drafts = [[(7 * i) % 250 for i in range(60)]], [np.arange(100, 110)]
        distributions = distributions_along(target.model, prompts, drafts)

        async def ask(engine: Engine) -> list[tuple[TopK, list[np.ndarray]]]:
            return [
                (
                    await engine.score_drafts(prompts, drafts, 20, 1.0, (await engine.probe([1, 2])).scoring[0]),
                    await engine.score_named(prompts, drafts, [[5, 6]] * 10),
                )
                for _ in range(2)
            ]

        for top, rows in use(target, ask):
            assert_lists(top, distributions, 20)
            np.testing.assert_allclose(rows, [row[[5, 6]] for row in distributions], atol=CLOSE)

    def test_score_of_a_text(self, target: Target) -> None:
        text = [10, 20, 30, 250, 7, 91, 3]
        own, top = use(target, lambda engine: engine.score(text, 3))
        distributions = [distribution(target.model, text[:i]) for i in range(3, len(text))]
        np.testing.assert_allclose(
            own, [row[token] for row, token in zip(distributions, text[3:], strict=True)], atol=CLOSE
        )
        np.testing.assert_allclose(top, [row.max() for row in distributions], atol=CLOSE)

    # ---- changes while it runs

    def test_weights_are_reloaded(self, target: Target) -> None:
        async def ask(engine: Engine) -> list[TopK]:
            lists = []
            for model in (target.other, target.model):
                await engine.reload_weights(str(model))
                lists.append(await engine.next_top_k(PROMPTS, 20))
            return lists

        for top, model in zip(use(target, ask), (target.other, target.model), strict=True):
            assert_lists(top, [distribution(model, prompt) for prompt in PROMPTS], 20)

    def test_requests_in_flight_never_see_half_loaded_weights(self, target: Target) -> None:
        """Each list they get is one model's or the other's, whatever tokens came before it."""
        prompts, lengths = [[i, i + 1] for i in range(8)], [240] * 8

        async def ask(engine: Engine) -> Any:
            drafting = asyncio.create_task(engine.draft(prompts, lengths, 10, 1.0, list(range(8))))
            await asyncio.sleep(0.2)
            try:
                await engine.reload_weights(str(target.other))
                return await drafting
            finally:
                await engine.reload_weights(str(target.model))

        drafts = use(target, ask)
        old, new = (np.array(distributions_along(m, prompts, drafts.token_ids)) for m in (target.model, target.other))
        rows = np.arange(len(old))[:, None]
        errors = [
            np.abs(distributions[rows, drafts.lists.token_ids] - drafts.lists.logprobs).max(axis=1)
            for distributions in (old, new)
        ]
        assert np.minimum(*errors).max() < CLOSE

    def test_adapters_are_loaded_and_replaced(self, target: Target, tmp_path: Path) -> None:
        adapters = [make_adapter(target.model, tmp_path / f"adapter-{seed}", seed) for seed in (1, 2)]

        async def ask(engine: Engine) -> list[TopK]:
            lists = [await engine.next_top_k(PROMPTS, 20)]
            for adapter in adapters:
                await engine.load_lora("conformance", str(adapter))
                engine.use_lora("conformance")
                lists.append(await engine.next_top_k(PROMPTS, 20))
            return lists

        base, *adapted = use(target.with_lora, ask)
        assert_lists(base, [distribution(target.model, prompt) for prompt in PROMPTS], 20)
        for top, adapter in zip(adapted, adapters, strict=True):
            model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(target.model), adapter).eval()
            assert_lists(top, [logprobs_of(model, prompt)[-1] for prompt in PROMPTS], 20)

    def test_prefix_cache_is_dropped(self, target: Target) -> None:
        prompt = [(7 * i + 3) % 250 for i in range(100)]

        async def ask(engine: Engine) -> list[int]:
            cached = []
            for reset in (False, False, True):
                if reset:
                    await engine.reset_prefix_cache()
                info = await engine.describe()
                body = {"model": info.model, "prompt": prompt, "max_tokens": 1}
                answer = await engine._http.post("/v1/completions", body)  # type: ignore[attr-defined]
                cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
            return cached

        _, cached, after_reset = use(target, ask)
        assert cached >= 64 and after_reset == 0

    # ---- refusals

    @pytest.mark.parametrize(
        "ask",
        [
            lambda engine: engine.next_top_k([[1] * MAX_MODEL_LEN], 1),
            lambda engine: engine.next_top_k([[1], [2] * (MAX_MODEL_LEN + 9)], 1),
            lambda engine: engine.draft([[1] * (MAX_MODEL_LEN - 3)], [9], 1, 1.0, [0]),
            lambda engine: engine.next_top_k([[1_000_000]], 1),
            lambda engine: engine.next_top_k([[1]], MAX_LOGPROBS + 1),
            lambda engine: engine.named_logprobs([[1]], [[1_000_000]]),
        ],
        ids=["full context", "too long in a list", "no room for a draft", "no such token", "list", "no such name"],
    )
    def test_what_cannot_be_done_is_refused(
        self, target: Target, ask: Callable[[Engine], Awaitable[Any]], request: pytest.FixtureRequest
    ) -> None:
        if request.node.callspec.id in self.accepts:
            pytest.skip("this server can")
        with pytest.raises(EngineRejectedError) as caught:
            use(target, ask)
        assert caught.value.status == 400
        assert use(target, lambda engine: engine.next_top_k([[1]], 1)).token_ids.shape == (1, 1)

    def test_a_model_that_is_not_served_is_refused(self, target: Target) -> None:
        with pytest.raises(EngineRejectedError, match="nope"):
            use(target, lambda engine: engine.next_top_k([[1]], 1), model="nope")

    def test_an_adapter_that_is_not_there_is_refused(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(EngineRejectedError, match=self.absent_adapter):
            use(target.with_lora, lambda engine: engine.load_lora("absent", str(tmp_path / "absent")))

    def test_weights_that_are_not_there_are_noticed_before_a_reload(self, target: Target, tmp_path: Path) -> None:
        with pytest.raises(EngineProtocolError, match="does not see"):
            use(target, lambda engine: engine.check_sees(str(tmp_path / "absent")))
        top = use(target, lambda engine: engine.next_top_k(PROMPTS, 20))
        assert_lists(top, [distribution(target.model, prompt) for prompt in PROMPTS], 20)

    def test_a_server_that_is_not_there(self, target: Target) -> None:
        calls: list[Callable[[Engine], Awaitable[Any]]] = [
            lambda engine: engine.health(),
            lambda engine: engine.describe(),
            lambda engine: engine.probe([1]),
        ]
        for ask in calls:
            with pytest.raises(EngineUnavailableError):
                use(replace(target, url="http://127.0.0.1:9"), ask)

    def test_errors_name_the_server(self, target: Target) -> None:
        with pytest.raises(EngineError, match=target.url):
            use(target, lambda engine: engine.next_top_k([[1_000_000]], 1))


def use(target: Target, ask: Callable[[Engine], Awaitable[T]], **options: Any) -> T:
    """What `ask` returns, given an engine on the server."""

    async def run() -> T:
        transport = HttpTransport(target.url, max_retries=1)
        try:
            return await ask(target.engine(transport, **options))
        finally:
            await transport.aclose()

    return asyncio.run(asyncio.wait_for(run(), HANG))


_models: dict[Path, Any] = {}


def reference(folder: Path) -> Any:
    if folder not in _models:
        _models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _models[folder]


def logprobs_of(model: Any, text: Sequence[int]) -> np.ndarray:
    """Log-probabilities `(len(text), V)` of what follows each token."""
    with torch.no_grad():
        return model(torch.tensor([list(text)])).logits[0].double().log_softmax(-1).numpy()


def distribution(folder: Path, prompt: Sequence[int]) -> np.ndarray:
    """Log-probabilities `(V,)` of the next token."""
    return logprobs_of(reference(folder), prompt)[-1]


def distributions_along(
    folder: Path, prompts: Sequence[Sequence[int]], drafts: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Log-probabilities `(V,)` at every position of every draft."""
    rows: list[np.ndarray] = []
    for prompt, draft in zip(prompts, drafts, strict=True):
        every = logprobs_of(reference(folder), [*prompt, *draft.tolist()])
        rows += list(every[len(prompt) - 1 : -1])
    return rows


def assert_lists(top: TopK, distributions: Sequence[np.ndarray], k: int) -> None:
    """The lists hold the k most likely tokens of the distributions, ids exactly and log-probabilities closely."""
    assert top.token_ids.shape == top.logprobs.shape == (len(distributions), k)
    assert NO_TOKEN not in top.token_ids
    for ids, logprobs, expected in zip(top.token_ids, top.logprobs, distributions, strict=True):
        np.testing.assert_allclose(logprobs, expected[ids], atol=CLOSE)
        assert set(ids.tolist()) == set(np.argsort(-expected)[:k].tolist())


def make_adapter(model: Path, folder: Path, seed: int) -> Path:
    """A LoRA adapter that changes the model's distributions visibly."""
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapted.save_pretrained(folder)
    return folder
