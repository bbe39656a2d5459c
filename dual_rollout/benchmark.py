"""What sampling from q* costs, on two servers or on one, against what they do alone and against the obvious loop.

Every figure comes from the same prompts in the same run; ratios between rows of one run are what to quote.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.coordinator import DualVLLMCoordinator
from dual_rollout.engines.http import HttpTransport
from dual_rollout.text import load_tokenizer

MODES = ("theta", "t", "both", "naive", "lockstep", "block", "auto", "native", "native_plain")
NATIVE_MODES = ("native", "native_plain")
BASES = ("both", "t", "lockstep", "naive")

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
        native_url: a `dual-rollout serve-native`, for the modes `native` (`generate_batch`, with log π_θ of each token)
            and `native_plain` (tokens alone, what any client of that server gets).
        max_tokens: tokens per sequence; EOS is ignored, so that all modes produce the same number.
    """

    def __init__(self, config: CoordinatorConfig, *, native_url: str | None = None, max_tokens: int):
        self._config = config
        self._native_url = native_url
        self._max_tokens = max_tokens
        self._tokenizer: Any = None

    async def run(self, mode: str, concurrency: int, context: int) -> Row:
        """One row: a warm-up with other prompts, then the measured run."""
        if mode == "naive":
            return await self._naive(concurrency, context)
        if mode in ("theta", "t", "both", "native_plain"):
            return await self._plain(mode, concurrency, context)
        return await self._sampling(mode, concurrency, context)

    async def _sampling(self, mode: str, concurrency: int, context: int) -> Row:
        """`generate_batch`: q*, with all that a record holds."""
        values = {**asdict(self._config), "ignore_eos": True, "max_concurrency": concurrency}
        if mode == "native":
            values |= {"engine": "native", "theta_url": self._urls(mode)[0], "theta_model": None}
        else:
            values["decoding"] = mode
        async with DualVLLMCoordinator(CoordinatorConfig.from_dict(values)) as coordinator:
            await coordinator.generate_batch(
                await self._prompts(concurrency, context, salt=1), max_tokens=self._max_tokens
            )
            started = time.perf_counter()
            await coordinator.generate_batch(await self._prompts(concurrency, context, salt=2), max_tokens=1)
            first = time.perf_counter() - started
            prompts = await self._prompts(concurrency, context, salt=3)
            stats = coordinator.stats
            before = _totals(stats.theta, stats.t)
            drafted, accepted = stats.decoding.draft_tokens, stats.decoding.accepted_tokens
            meter = _Meter()
            outputs = await coordinator.generate_batch(prompts, max_tokens=self._max_tokens)
            for output in outputs:
                if output.error is not None:
                    raise RuntimeError(f"{mode}: {output.error}")
            tokens = sum(len(output.generated_tokens) for output in outputs)
            drafts = stats.decoding.draft_tokens - drafted
            return meter.row(
                mode,
                concurrency,
                context,
                tokens,
                _totals(stats.theta, stats.t) - before,
                first,
                acceptance=(stats.decoding.accepted_tokens - accepted) / drafts if drafts else None,
                chosen=str(coordinator.chosen) if mode == "auto" and coordinator.chosen else None,
            )

    async def _plain(self, mode: str, concurrency: int, context: int) -> Row:
        """Both servers, or one, generating on their own; with both, a token counts once each has made one."""
        transports = [HttpTransport(url, pool_size=concurrency) for url in self._urls(mode)]
        models = [(await transport.get("/v1/models"))["data"][0]["id"] for transport in transports]

        async def generate(salt: int, max_tokens: int) -> None:
            prompts = await self._prompts(concurrency, context, salt)
            await asyncio.gather(
                *(
                    transport.post("/v1/completions", _plain_request(model, prompt, max_tokens))
                    for transport, model in zip(transports, models, strict=True)
                    for prompt in prompts
                )
            )

        try:
            await generate(1, self._max_tokens)
            started = time.perf_counter()
            await generate(2, 1)
            first = time.perf_counter() - started
            before = _totals(*(transport.stats for transport in transports))
            meter = _Meter()
            await generate(3, self._max_tokens)
            after = _totals(*(transport.stats for transport in transports))
            return meter.row(mode, concurrency, context, concurrency * self._max_tokens, after - before, first)
        finally:
            for transport in transports:
                await transport.aclose()

    async def _naive(self, concurrency: int, context: int) -> Row:
        """The obvious loop: text prompts, one request per token, sequence and server, bisection on dictionaries."""
        tokenizer = await self._find_tokenizer()
        if tokenizer is None:
            raise ValueError("the naive loop sends text: set --tokenizer to the model's")
        transports = [HttpTransport(url, pool_size=concurrency) for url in self._urls("naive")]
        models = [(await transport.get("/v1/models"))["data"][0]["id"] for transport in transports]
        rng = np.random.default_rng(0)

        async def generate(salt: int, max_tokens: int) -> None:
            async def one(ids: list[int]) -> None:
                text = tokenizer.decode(ids)
                for _ in range(max_tokens):
                    lists = await asyncio.gather(
                        *(
                            transport.post("/v1/completions", _naive_request(model, text, int(self._config.top_k)))
                            for transport, model in zip(transports, models, strict=True)
                        )
                    )
                    tops = [answer["choices"][0]["logprobs"]["top_logprobs"][0] for answer in lists]
                    text += _naive_token(tops[0], tops[1], rng)

            await asyncio.gather(*(one(ids) for ids in await self._prompts(concurrency, context, salt)))

        try:
            started = time.perf_counter()
            await generate(2, 1)
            first = time.perf_counter() - started
            before = _totals(*(transport.stats for transport in transports))
            meter = _Meter()
            await generate(3, self._max_tokens)
            after = _totals(*(transport.stats for transport in transports))
            return meter.row("naive", concurrency, context, concurrency * self._max_tokens, after - before, first)
        finally:
            for transport in transports:
                await transport.aclose()

    def _urls(self, mode: str) -> list[str]:
        theta, t = (str(url) for url in (self._config.theta_url, self._config.t_url))
        if mode in NATIVE_MODES:
            if self._native_url is None:
                raise ValueError(f"mode {mode} needs the URL of a dual-rollout serve-native: set --native-url")
            return [self._native_url]
        return {"theta": [theta], "t": [t]}.get(mode, [theta, t])

    async def _prompts(self, count: int, length: int, salt: int) -> list[list[int]]:
        """Token-id prompts of exactly `length`, no two with a common beginning."""
        tokenizer = await self._find_tokenizer()
        if tokenizer is None:
            return np.random.default_rng([salt, length]).integers(3, 100, (count, length)).tolist()
        ids = tokenizer(_PASSAGE)["input_ids"]
        ids = ids * (length // len(ids) + 2)
        prompts = []
        for i in range(count):
            head = tokenizer(f"Note {salt}.{i}: ")["input_ids"]
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


def _plain_request(model: str, prompt: Sequence[int], max_tokens: int) -> dict[str, Any]:
    sampling = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, **sampling}


def _naive_request(model: str, text: str, top_k: int) -> dict[str, Any]:
    return {**_plain_request(model, [], 1), "prompt": text, "logprobs": top_k}


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
