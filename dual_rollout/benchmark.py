"""What sampling from q* costs, on two servers or on one, against what they do alone and against the obvious loop.

Every figure comes from the same prompts in the same run, but for a number at their beginning, so that no server has any
of them in its cache; ratios between rows of one run are what to quote.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.servers.http import HttpTransport
from dual_rollout.text import load_tokenizer

NATIVE_MODES = ("native_plain", "native", "pairs_plain", "pairs")
MODES = ("theta", "t", "both", "naive", "lockstep", "block", "auto", *NATIVE_MODES)
BASES = ("both", "t", "lockstep", "naive", "native_plain", "pairs_plain")

_MAX_WARM_UPS = 6

_PASSAGE = (
    "The river rises in the hills above the town and runs for ninety miles before it meets the sea. In spring the snow "
    "melts and the water stands high in the meadows; by August a child can cross at the mill. People here have argued "
    "for two hundred years about whether to build a dam. Those who farm the upper valley want water in summer. Those "
    "who fish near the mouth fear for the salmon. Engineers have drawn plans, lawyers have read them, and every plan "
    "has ended in a drawer. Last year a schoolteacher asked her class to measure the river every day and to write down "
    "what they saw. They counted birds, timed floating sticks, and drew the shape of the banks. "
)


@dataclass(frozen=True, slots=True)
class Row:
    """One mode at one load. Times in seconds, sizes in KB, CPU of this process in microseconds.

    `first_token_s` is the time until every sequence of a batch of its own has one token, its record complete.
    `cpu_us_per_token` of the modes that only ask the servers to generate is the cost of waiting for them. `relative` is
    the speed as a fraction of that of other modes at the same load, see `summarise`.
    """

    mode: str
    concurrency: int
    context: int
    tokens_per_second: float
    requests_per_token: float
    kb_per_token: float
    acceptance: float | None
    first_token_s: float
    cpu_us_per_token: float
    chosen: str | None
    relative: Mapping[str, float] = field(default_factory=dict)


def summarise(runs: Sequence[Sequence[Row]]) -> list[Row]:
    """One row per mode, of all modes' runs at one load, taken in turn: the run of median speed, with its ratios.

    A ratio is the median, over the runs, of the speed to that of `BASES` in the same turn: a drift of the machine's
    speed meets both alike.
    """
    speeds = {rows[0].mode: [row.tokens_per_second for row in rows] for rows in zip(*runs, strict=True)}
    bases = [base for base in BASES if base in speeds]
    summary = []
    for rows in zip(*runs, strict=True):
        middle = sorted(rows, key=lambda row: row.tokens_per_second)[len(rows) // 2]
        own = speeds[middle.mode]
        relative = {base: float(np.median(np.divide(own, speeds[base]))) for base in bases}
        summary.append(replace(middle, relative=relative))
    return summary


class Benchmark:
    """Runs modes on the servers of a config, and on a native one of the same two models.

    Args:
        config: `decoding` is set per mode; its other fields are used as they are.
        naive_urls: servers of the same two models for the mode `naive`, which sends text, where those of the config
            were started without a tokenizer.
        native_url: a `dual-rollout serve-native`, for the modes `native` (rollouts of one prompt, for a server of two
            models) and `pairs` (π_t sees a prompt that is half as long again), beside `native_plain` and `pairs_plain`:
            plain generation of the same prompts by the same server.
        max_tokens: tokens per sequence; EOS is ignored, so that all modes produce the same number.
    """

    def __init__(
        self,
        config: CoordinatorConfig,
        *,
        naive_urls: Sequence[str] | None = None,
        native_url: str | None = None,
        max_tokens: int,
    ):
        self._config = config
        self._naive_urls = naive_urls
        self._native_url = native_url
        self._max_tokens = max_tokens
        self._tokenizer: Any = None
        self._salts = itertools.count()

    async def run(self, mode: str, concurrency: int, context: int) -> Row:
        """One row: a warm-up, a batch of one token each, then the measured run, each with prompts of its own."""
        if mode == "naive":
            return await self._asking(mode, concurrency, context, self._naive_sequence)
        if mode in ("theta", "t", "both", "native_plain", "pairs_plain"):
            return await self._asking(mode, concurrency, context, _plain_sequence)
        return await self._sampling(mode, concurrency, context)

    async def _sampling(self, mode: str, concurrency: int, context: int) -> Row:
        """`generate_batch`: q*, with all that a record holds. It is warm when it has found out how to go fastest: all
        modes choose the grouping, block the way to score, `auto` the mode."""
        values = {**asdict(self._config), "ignore_eos": True, "max_concurrency": concurrency}
        if mode in NATIVE_MODES:
            values |= {"engine": "native", "theta_url": self._urls(mode)[0], "theta_model": None}
        else:
            values["decoding"] = mode
        async with DualVLLMCoordinator(CoordinatorConfig.from_dict(values)) as coordinator:

            async def generate(prompts: list[list[int]], max_tokens: int) -> None:
                t_prompts = prompts[concurrency:] or None
                for output in await coordinator.generate_batch(
                    prompts[:concurrency], t_prompts=t_prompts, max_tokens=max_tokens
                ):
                    if output.error is not None:
                        raise RuntimeError(f"{mode}: {output.error}")

            for _ in range(_MAX_WARM_UPS):
                await generate(await self._contexts(mode, concurrency, context), self._max_tokens)
                if mode in NATIVE_MODES or coordinator.stats.chosen:
                    break
            stats = coordinator.stats
            prompts, started = await self._contexts(mode, concurrency, context), time.perf_counter()
            await generate(prompts, 1)
            first = time.perf_counter() - started
            prompts = await self._contexts(mode, concurrency, context)
            before = _totals(stats.theta, stats.t)
            drafted, accepted = stats.decoding.draft_tokens, stats.decoding.accepted_tokens
            meter = _Meter()
            await generate(prompts, self._max_tokens)
            drafts = stats.decoding.draft_tokens - drafted
            return meter.row(
                mode,
                concurrency,
                context,
                concurrency * self._max_tokens,
                _totals(stats.theta, stats.t) - before,
                first,
                acceptance=(stats.decoding.accepted_tokens - accepted) / drafts if drafts else None,
                chosen=coordinator.stats.chosen.get("t_url") if mode == "auto" else None,
            )

    async def _asking(self, mode: str, concurrency: int, context: int, sequence: _Sequence) -> Row:
        """Requests and nothing else: `sequence` asks for one sequence from all servers of the mode.

        With both servers, or both contexts, generated on their own, a token counts once each has one.
        """
        # Two requests of each sequence where both contexts are generated plainly.
        servers = [_Server(HttpTransport(url, pool_size=2 * concurrency)) for url in self._urls(mode)]

        async def generate(prompts: list[list[int]], max_tokens: int) -> None:
            await asyncio.gather(*(sequence(servers, prompt, max_tokens) for prompt in prompts))

        try:
            for server in servers:
                await server.find_model()
            await generate(await self._contexts(mode, concurrency, context), self._max_tokens)
            prompts, started = await self._contexts(mode, concurrency, context), time.perf_counter()
            await generate(prompts, 1)
            first = time.perf_counter() - started
            prompts = await self._contexts(mode, concurrency, context)
            before = _totals(*(server.http.stats for server in servers))
            meter = _Meter()
            await generate(prompts, self._max_tokens)
            traffic = _totals(*(server.http.stats for server in servers)) - before
            return meter.row(mode, concurrency, context, concurrency * self._max_tokens, traffic, first)
        finally:
            for server in servers:
                await server.http.aclose()

    async def _naive_sequence(self, servers: Sequence[_Server], prompt: list[int], max_tokens: int) -> None:
        """The obvious loop: text prompts, one request per token, sequence and server, bisection on dictionaries."""
        tokenizer = await self._find_tokenizer()
        if tokenizer is None:
            raise ValueError("the naive loop sends text: set --tokenizer to the model's")
        text, rng = tokenizer.decode(prompt), np.random.default_rng(0)
        for _ in range(max_tokens):
            answers = await asyncio.gather(
                *(server.complete(text, 1, logprobs=int(self._config.top_k)) for server in servers)
            )
            tops = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in answers]
            text += _naive_token(tops[0], tops[1], rng)

    def _urls(self, mode: str) -> list[str]:
        theta, t = (str(url) for url in (self._config.theta_url, self._config.t_url))
        if mode in NATIVE_MODES:
            if self._native_url is None:
                raise ValueError(f"mode {mode} needs the URL of a dual-rollout serve-native: set --native-url")
            return [self._native_url]
        if mode == "naive" and self._naive_urls is not None:
            return list(self._naive_urls)
        return {"theta": [theta], "t": [t]}.get(mode, [theta, t])

    async def _contexts(self, mode: str, count: int, length: int) -> list[list[int]]:
        """π_θ's prompts, and after them π_t's where it sees others."""
        prompts = await self._prompts(count, length)
        if mode in ("pairs", "pairs_plain"):
            prompts += await self._prompts(count, length + length // 2)
        return prompts

    async def _prompts(self, count: int, length: int) -> list[list[int]]:
        """Token-id prompts of exactly `length`, no two with a common beginning, not even with those of other calls."""
        tokenizer, salt = await self._find_tokenizer(), next(self._salts)
        if tokenizer is None:
            return np.random.default_rng([salt, length]).integers(3, 100, (count, length)).tolist()
        ids = tokenizer(_PASSAGE)["input_ids"]
        ids = ids * (length // len(ids) + 2)
        prompts = []
        for i in range(count):
            head = tokenizer(f"{salt}.{i}: ")["input_ids"]
            prompts.append((head + ids[7 * i % 50 :])[:length])
        return prompts

    async def _find_tokenizer(self) -> Any:
        if self._tokenizer is None:
            name = self._config.tokenizer
            if name is None:
                transport = HttpTransport(self._urls("theta")[0])
                name = (await transport.get("/v1/models"))["data"][0].get("root")
                await transport.aclose()
            try:
                self._tokenizer = load_tokenizer(name, local_files_only=True) if name else None
            except (OSError, ValueError):
                self._tokenizer = None
        return self._tokenizer


class _Meter:
    """Wall and CPU clock from its making."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def row(
        self,
        mode: str,
        concurrency: int,
        context: int,
        tokens: int,
        traffic: np.ndarray,
        first_token_s: float,
        *,
        acceptance: float | None = None,
        chosen: str | None = None,
    ) -> Row:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        requests, size = traffic / tokens
        return Row(
            mode,
            concurrency,
            context,
            tokens_per_second=tokens / wall,
            requests_per_token=float(requests),
            kb_per_token=float(size) / 1e3,
            acceptance=acceptance,
            first_token_s=first_token_s,
            cpu_us_per_token=1e6 * cpu / tokens,
            chosen=chosen,
        )


def _totals(*stats: Any) -> np.ndarray:
    """Requests and bytes, over servers."""
    return np.array([sum(s.requests for s in stats), sum(s.bytes_sent + s.bytes_received for s in stats)], dtype=float)


class _Server:
    """One server, asked as plainly as can be."""

    def __init__(self, http: HttpTransport):
        self.http = http
        self._model = ""

    async def find_model(self) -> None:
        self._model = (await self.http.get("/v1/models"))["data"][0]["id"]

    async def complete(self, prompt: str | Sequence[int], max_tokens: int, **options: Any) -> Any:
        sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "ignore_eos": True}
        payload = {"model": self._model, "prompt": prompt, "max_tokens": max_tokens, **sampling, **options}
        return await self.http.post("/v1/completions", payload)


_Sequence = Callable[[Sequence[_Server], list[int], int], Awaitable[None]]


async def _plain_sequence(servers: Sequence[_Server], prompt: list[int], max_tokens: int) -> None:
    await asyncio.gather(*(server.complete(prompt, max_tokens) for server in servers))


def _naive_token(theta: dict[str, float], t: dict[str, float], rng: np.random.Generator) -> str:
    """α by bisection and a draw, as one would write it first."""
    tokens = sorted(theta.keys() | t.keys())
    p = np.exp([theta.get(token, min(theta.values())) for token in tokens])
    r = np.exp([t.get(token, min(t.values())) for token in tokens])
    p, r = p / p.sum(), r / r.sum()
    low, high = 0.0, 1.0
    for _ in range(50):
        alpha = (low + high) / 2
        q = p ** (1 - alpha) * r**alpha
        q /= q.sum()
        difference = float((q * np.log(q / p)).sum() - (q * np.log(q / r)).sum())
        low, high = (alpha, high) if difference < 0 else (low, alpha)
    return tokens[int(rng.choice(len(tokens), p=q))]
