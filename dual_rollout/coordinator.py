"""`DualVLLMCoordinator`: prompts in, sequences from q* out."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np

from dual_rollout.config import NO_TARGET, CoordinatorConfig, did_you_mean, url_list
from dual_rollout.decoding import (
    DecodingSequence,
    DecodingStats,
    NativeDecoder,
    OnFinished,
    OnToken,
    Outage,
    PolicyWeights,
    Recorder,
    Tuner,
    decode,
    decode_policy,
)
from dual_rollout.decoding.outage import until_back
from dual_rollout.engines import (
    Engine,
    EngineInfo,
    HttpStats,
    HttpTransport,
    NativeEngine,
    Replicas,
    SGLangEngine,
    VLLMEngine,
)
from dual_rollout.engines.base import TokenIds
from dual_rollout.exceptions import EngineUnavailableError, PreflightError
from dual_rollout.preflight import check_policy, check_servers
from dual_rollout.text import (
    IncrementalDecoder,
    decode_tokens,
    encode_prompt,
    is_text,
    load_tokenizer,
    names_special_token,
    stop_token_ids,
)
from dual_rollout.types import GenerationOutput, GenerationRequest, Prompt, StreamChunk

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_PROMPTS_PER_REQUEST = 1024  # vLLM refuses longer lists
_STREAMED_BLOCK = 16  # tokens a native server draws per request while streaming
_ENGINES: dict[str, Callable[[HttpTransport, str | None], Engine]] = {"vllm": VLLMEngine, "sglang": SGLangEngine}


@dataclass(slots=True)
class CoordinatorStats:
    """Totals over a coordinator's life.

    Attributes:
        seconds: time spent inside generate calls.
        truncated_prompts: prompts that lost tokens at their beginning (`long_prompts`).
        special_names: prompts whose text named a special token that was read as plain characters
            (`parse_special_tokens`).
        tuners: what measures the ways to decode, by the name of the target; `"t_url"` for the one there.
    """

    decoding: DecodingStats = field(default_factory=DecodingStats)
    theta: HttpStats = field(default_factory=HttpStats)
    t: HttpStats = field(default_factory=HttpStats)
    targets: dict[str, HttpStats] = field(default_factory=dict)
    seconds: float = 0.0
    truncated_prompts: int = 0
    special_names: int = 0
    tuners: dict[str, Tuner] = field(default_factory=dict)

    @property
    def chosen(self) -> dict[str, str]:
        """How each target's sequences are decoded: what was found fastest at the latest load; `tuning` says why."""
        return {name: str(tuner.chosen) for name, tuner in self.tuners.items() if tuner.chosen is not None}

    @property
    def tuning(self) -> dict[str, dict[str, dict[str, float]]]:
        """Tokens per second measured for each way to decode, by target and load."""
        return {name: tuner.report() for name, tuner in self.tuners.items() if tuner.chosen is not None}

    @property
    def tokens_per_second(self) -> float:
        return self.decoding.tokens / self.seconds if self.seconds else 0.0

    @property
    def retries(self) -> int:
        return sum(stats.retries for stats in (self.theta, self.t, *self.targets.values()))


@dataclass(frozen=True, slots=True)
class _Call:
    """What the sequences of one call share: its arguments, checked, and what the servers said of their models."""

    config: CoordinatorConfig
    max_tokens: int
    stop_ids: frozenset[int]
    entropy: int
    theta: EngineInfo
    targets: Mapping[str | None, EngineInfo | None]


@dataclass(slots=True)
class _Target:
    """A π_t: where the config names it, and what has been found out about its server."""

    flag: str
    engine: Engine
    tuner: Tuner = field(default_factory=Tuner)
    outage: Outage = field(default_factory=Outage)
    checked: bool = False


class DualVLLMCoordinator:
    """Samples from q* between two servers.

    ```python
    async with DualVLLMCoordinator(CoordinatorConfig(theta_url=..., t_url=...)) as coordinator:
        outputs = await coordinator.generate_batch(["Hello"], max_tokens=32)
    ```

    Args:
        config: see `CoordinatorConfig`.
        tokenizer: a loaded tokenizer to use instead of `config.tokenizer`.

    Attributes:
        weight_version: the version of π_θ's weights, for the outputs to record; set by whoever changes the weights
            between rollouts. For a change while sequences are drawn there is `changing_weights`.

    Raises:
        PreflightError: from the first call, when the servers cannot serve what `config` asks.
    """

    def __init__(self, config: CoordinatorConfig, *, tokenizer: Any = None):
        if config.max_concurrency > _MAX_PROMPTS_PER_REQUEST:
            raise ValueError(
                f"max_concurrency must be at most {_MAX_PROMPTS_PER_REQUEST}, got {config.max_concurrency}"
            )
        self.config = config
        self.tokenizer = tokenizer
        self.stats = CoordinatorStats()
        self._transports: list[HttpTransport] = []
        self._replicas: list[Replicas] = []
        self._native: NativeEngine | None = None
        if config.engine == "native":
            self._native = NativeEngine(
                self._transport(url_list(config.theta_url)[0], self.stats.theta), config.theta_model
            )
            self.theta: Engine = self._native
            self.t: Engine = self._native
        else:
            self.theta = self._engine(config.theta_engine, config.theta_url, config.theta_model, self.stats.theta)
            self.t = self._engine(config.t_engine, config.t_url, config.t_model, self.stats.t)
        self._targets: dict[str | None, _Target] = {None: _Target("t_url", self.t)}
        for name, urls in (config.targets or {}).items():
            stats = self.stats.targets[name] = HttpStats()
            self._targets[name] = _Target(f"targets[{name!r}]", self._engine(config.t_engine, urls, None, stats))
        self.stats.tuners = {name or "t_url": target.tuner for name, target in self._targets.items()}
        self._weights = PolicyWeights()
        self._tokenizer_sought = False

    @property
    def weight_version(self) -> int | None:
        return self._weights.version

    @weight_version.setter
    def weight_version(self, version: int | None) -> None:
        self._weights.version = version

    def changing_weights(self, version: int) -> AbstractAsyncContextManager[None]:
        """Change π_θ's weights while sequences are drawn (`allow_mixed_versions`).

        ```python
        async with coordinator.changing_weights(2):
            await coordinator.theta.reload_weights(folder)
        ```

        The positions that are being asked for are completed first, by the weights they were asked of, and no others
        are until the block is left; then `weight_version` is `version`. So every token's law, and all that is recorded
        of it, comes from the weights whose version it has. If the block raises, the version stays.
        """
        return self._weights.changing(version)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for replicas in self._replicas:
            await replicas.aclose()
        for transport in self._transports:
            await transport.aclose()

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        t_prompts: Sequence[Prompt] | None = None,
        targets: Sequence[str | None] | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        return_diagnostics: bool = False,
    ) -> list[GenerationOutput]:
        """One sequence from q* per prompt, in order. A prompt that fails has its `error` set; the others go on.

        Args:
            prompts: strings, chat message lists or token-id lists, as π_θ sees them.
            max_tokens: tokens per sequence at most.
            t_prompts: what π_t sees instead, one per prompt (privileged context); the completion is shared.
            targets: which π_t, one per prompt: a name in `config.targets`, None for the one at `t_url`, or "none" for
                no target: plain generation from π_θ, with α = 0, log q* = log π_θ, weight exactly 1, log π_t NaN.
            temperature, seed: override the config's for this call.
            stop_token_ids: stop at these too, besides EOS.
            return_diagnostics: fill `GenerationOutput.diagnostics`.

        Raises:
            ValueError: wrong arguments.
            PreflightError: the servers cannot serve what the config asks.
        """
        for name, given in (("prompts", prompts), ("t_prompts", t_prompts), ("targets", targets)):
            if given is None and name != "prompts":
                continue
            if isinstance(given, (str, bytes)) or not isinstance(given, Sequence):
                of = "names" if name == "targets" else "prompts"
                raise ValueError(f"{name} must be a list of {of}, one entry per prompt; got one {type(given).__name__}")
        config = self._call_config(temperature, seed)
        names = self._target_names(targets, len(prompts))
        sequences, outputs = await self._sequences(prompts, t_prompts, max_tokens, stop_token_ids, config, names)
        started = time.perf_counter()
        with _progress(config.show_progress, total=len(prompts)) as bar:
            await self._decode_by_target(
                sequences,
                names,
                config,
                with_diagnostics=return_diagnostics,
                on_token=lambda sequence: bar.update() if sequence.done else None,
            )
        self.stats.seconds += time.perf_counter() - started
        for sequence, output in zip(sequences, outputs, strict=True):
            self._fill(output, sequence)
        return outputs

    async def generate_iter(
        self,
        requests: Iterable[GenerationRequest],
        *,
        max_tokens: int = 256,
        temperature: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
        return_diagnostics: bool = False,
    ) -> AsyncGenerator[tuple[int, GenerationOutput]]:
        """The index and the output of each request as it finishes, in no particular order; for inputs of any length.

        A request is taken from the iterable when its sequence is about to begin, and `max_concurrency` are in flight
        at all times. When the outputs are not taken, no new sequences begin. With a seed the output of a request does
        not depend on the others, nor on whether there are any. Other arguments as in `generate_batch`.

        Raises:
            ValueError: wrong arguments.
            PreflightError: the servers cannot serve what the config asks.
            EngineUnavailableError: a server is gone for longer than the retries allow: what comes after would fail too.
        """
        config = self._call_config(temperature, seed)
        waiting = iter(requests)
        begun: dict[DecodingSequence, tuple[int, GenerationOutput]] = {}

        def begin(request: GenerationRequest, call: _Call) -> DecodingSequence:
            if self._native is not None and request.t_prompt is not None:
                raise ValueError('engine "native" shows both models one prompt: a t_prompt needs engine "dual"')
            sequence, output = self._sequence(request, None, call)
            begun[sequence] = request.index, output
            return sequence

        finished: asyncio.Queue[DecodingSequence | None] = asyncio.Queue()
        places = asyncio.Semaphore(config.max_concurrency)  # for finished sequences that wait to be taken

        async def hand_over(sequence: DecodingSequence) -> None:
            await places.acquire()
            finished.put_nowait(sequence)

        async def run() -> None:
            try:
                while first := list(itertools.islice(waiting, config.max_concurrency)):
                    text = any(is_text(request.prompt) or is_text(request.t_prompt or ()) for request in first)
                    call = await self._call(max_tokens, stop_token_ids, config, [None], needs_tokenizer=text)
                    sequences = [begin(request, call) for request in first]
                    good = [sequence for sequence in sequences if not sequence.done]
                    if not good:  # nothing to try the servers with
                        for sequence in sequences:
                            await hand_over(sequence)
                        continue
                    there = await self._preflight(good, None, config)
                    rest = (begin(request, call) for request in waiting)
                    await self._decode(
                        itertools.chain(sequences, rest),
                        config,
                        lost=not there,
                        with_diagnostics=return_diagnostics,
                        on_finished=hand_over,
                    )
            finally:
                finished.put_nowait(None)

        task, started = asyncio.create_task(run()), time.perf_counter()
        try:
            while (sequence := await finished.get()) is not None:
                if isinstance(sequence.failure, EngineUnavailableError):
                    raise sequence.failure
                index, output = begun.pop(sequence)
                self._fill(output, sequence)
                places.release()
                yield index, output
            await task
        finally:
            self.stats.seconds += time.perf_counter() - started
            task.cancel()
            await asyncio.wait([task])

    async def generate_stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        t_prompt: Prompt | None = None,
        target: str | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop_token_ids: Collection[int] = (),
    ) -> AsyncIterator[StreamChunk]:
        """The tokens of one sequence as they are sampled. Arguments as in `generate_batch`.

        Raises:
            ValueError: wrong arguments, or a prompt that cannot be generated from.
            DualRolloutError: a server's fault, after the chunks that came before it.
        """
        config = self._call_config(temperature, seed)
        t_prompts = None if t_prompt is None else [t_prompt]
        names = self._target_names([target], 1)
        (sequence,), _ = await self._sequences([prompt], t_prompts, max_tokens, stop_token_ids, config, names)
        if sequence.failure is not None:
            raise sequence.failure
        decoder = IncrementalDecoder(self.tokenizer) if self.tokenizer is not None else None
        chunks: asyncio.Queue[StreamChunk | None] = asyncio.Queue()

        async def run() -> None:
            try:
                await self._decode_by_target(
                    [sequence],
                    names,
                    config,
                    on_token=lambda s: chunks.put_nowait(_chunk(s, decoder)),
                    max_block=_STREAMED_BLOCK,
                )
            finally:
                chunks.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            await task
        finally:
            task.cancel()
        if sequence.failure is not None:
            raise sequence.failure

    async def _decode_by_target(
        self,
        sequences: list[DecodingSequence],
        names: list[str | None],
        config: CoordinatorConfig,
        *,
        on_token: OnToken,
        with_diagnostics: bool = False,
        max_block: int | None = None,
    ) -> None:
        """Decode all sequences to their end, those of each target side by side with those of the others."""
        routes: dict[str | None, list[DecodingSequence]] = {}
        for sequence, name in zip(sequences, names, strict=True):
            if not sequence.done:
                routes.setdefault(name, []).append(sequence)
        # All are checked before the first token is drawn.
        reachable = [await self._preflight(routes[name], name, config) for name in routes]
        shares = _shares([len(rows) for rows in routes.values()], config.max_concurrency)
        work = [
            self._decode(
                rows,
                replace(config, max_concurrency=share),
                name,
                lost=not there,
                on_token=on_token,
                with_diagnostics=with_diagnostics,
                max_block=max_block,
            )
            for (name, rows), there, share in zip(routes.items(), reachable, shares, strict=True)
        ]
        if sum(shares) <= config.max_concurrency:
            await asyncio.gather(*work)
        else:
            for part in work:
                await part

    async def _decode(
        self,
        sequences: Iterable[DecodingSequence],
        config: CoordinatorConfig,
        name: str | None = None,
        *,
        lost: bool = False,
        on_token: OnToken | None = None,
        on_finished: OnFinished | None = None,
        with_diagnostics: bool = False,
        max_block: int | None = None,
    ) -> None:
        """Decode sequences of one target to their end.

        Args:
            lost: its server is gone, and the sequences go on without.
            max_block: how many tokens a native server draws per request.
        """
        stats = self.stats.decoding
        if self._native is not None:
            decoder = NativeDecoder(self._native, config, stats, with_diagnostics, max_block, on_token, self._weights)
            await decoder.decode(sequences, on_finished)
            return
        target = self._targets[None if name == NO_TARGET else name]
        recorder = Recorder(
            self.theta,
            target.engine,
            config,
            stats,
            with_diagnostics=with_diagnostics,
            on_token=on_token,
            weights=self._weights,
        )
        if lost or name == NO_TARGET:
            await decode_policy(sequences, recorder, lost=lost, on_finished=on_finished)
        else:
            await decode(sequences, recorder, target.tuner, target.outage, on_finished)

    def _engine(self, kind: str, urls: str | list[str], model: str | None, stats: HttpStats) -> Engine:
        if isinstance(urls, str):
            return _ENGINES[kind](self._transport(urls, stats), model)
        engines = [_ENGINES[kind](self._transport(url, stats, replica=True), model) for url in urls]
        self._replicas.append(Replicas(engines, self.config.max_retries))
        return self._replicas[-1]

    def _transport(self, url: str, stats: HttpStats, *, replica: bool = False) -> HttpTransport:
        """`replica`: there are others to ask, so that few repeats will do."""
        config = self.config
        transport = HttpTransport(
            url,
            max_retries=min(config.max_retries, 1) if replica else config.max_retries,
            request_timeout=config.request_timeout,
            total_timeout=config.total_timeout,
            pool_size=config.connection_pool_size,
            stats=stats,
        )
        self._transports.append(transport)
        return transport

    def _call_config(self, temperature: float | None, seed: int | None) -> CoordinatorConfig:
        config = self.config
        return replace(
            config,
            temperature=config.temperature if temperature is None else temperature,
            seed=config.seed if seed is None else seed,
        )

    def _target_names(self, targets: Sequence[str | None] | None, count: int) -> list[str | None]:
        """The target of each of `count` prompts."""
        if targets is None:
            return [None] * count
        if isinstance(targets, str) or len(targets) != count:
            raise ValueError(f"targets must have one entry per prompt: got {targets!r} for {count} prompts")
        known = [name for name in self._targets if name is not None] + [NO_TARGET]
        for name in targets:
            if name is not None and name not in known:
                near = did_you_mean(name, known) if isinstance(name, str) else ""
                raise ValueError(f"unknown target {name!r}: it must be None or one of {', '.join(known)}{near}")
            if name is not None and self._native is not None:
                raise ValueError('engine "native" holds its one target: targets need engine "dual"')
        return list(targets)

    async def _describe_target(self, name: str | None, config: CoordinatorConfig) -> EngineInfo | None:
        """None where there is none, or where its server is gone and the sequences go on without."""
        if name == NO_TARGET:
            return None
        engine = self._targets[name].engine
        return await ask_target(engine.describe, engine.url, config.on_target_failure)

    async def _sequences(
        self,
        prompts: Sequence[Prompt],
        t_prompts: Sequence[Prompt] | None,
        max_tokens: int,
        stop_ids: Collection[int],
        config: CoordinatorConfig,
        names: list[str | None],
    ) -> tuple[list[DecodingSequence], list[GenerationOutput]]:
        """Tokenise once, check lengths, and give each sequence its own random stream."""
        if self._native is not None and t_prompts is not None:
            raise ValueError('engine "native" shows both models one prompt: t_prompts need engine "dual"')
        if t_prompts is not None and len(t_prompts) != len(prompts):
            raise ValueError(f"t_prompts must have one entry per prompt: {len(t_prompts)} for {len(prompts)} prompts")
        text = any(is_text(prompt) for prompt in [*prompts, *(t_prompts or [])])
        call = await self._call(max_tokens, stop_ids, config, set(names), needs_tokenizer=text)
        requests = (
            GenerationRequest(i, prompt, None if t_prompts is None else t_prompts[i])
            for i, prompt in enumerate(prompts)
        )
        pairs = [self._sequence(request, name, call) for request, name in zip(requests, names, strict=True)]
        return [sequence for sequence, _ in pairs], [output for _, output in pairs]

    async def _call(
        self,
        max_tokens: int,
        stop_ids: Collection[int],
        config: CoordinatorConfig,
        names: Collection[str | None],
        *,
        needs_tokenizer: bool,
    ) -> _Call:
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number >= 1, got {max_tokens!r}")
        if not isinstance(stop_ids, Collection) or not all(isinstance(token, int) for token in stop_ids):
            raise ValueError(f"stop_token_ids must be token ids, got {stop_ids!r}")
        theta, infos = await asyncio.gather(
            self.theta.describe(), asyncio.gather(*(self._describe_target(name, config) for name in names))
        )
        self._find_tokenizer(theta, needed=needs_tokenizer)
        stops = frozenset(stop_ids)
        if self.tokenizer is not None and not config.ignore_eos:
            stops |= stop_token_ids(self.tokenizer)
        entropy = secrets.randbits(64) if config.seed is None else config.seed % 2**64
        return _Call(config, max_tokens, stops, entropy, theta, dict(zip(names, infos, strict=True)))

    def _sequence(
        self, request: GenerationRequest, name: str | None, call: _Call
    ) -> tuple[DecodingSequence, GenerationOutput]:
        """A sequence with a random stream of its own, and where its result will go; failed if the prompt is bad."""
        error, ids, ids_t, t = None, list[int](), list[int](), call.targets[name]
        try:
            if request.t_prompt is None:
                ids = ids_t = self._fit(self._encode(request.prompt), call.max_tokens, {"π_θ": call.theta, "π_t": t})
            else:
                ids = self._fit(self._encode(request.prompt), call.max_tokens, {"π_θ": call.theta})
                ids_t = self._fit(self._encode(request.t_prompt), call.max_tokens, {"π_t": t})
        except ValueError as fault:
            error = fault
        key = (call.entropy, request.index)
        sequence = DecodingSequence(ids, ids_t, max_tokens=call.max_tokens, stop_ids=call.stop_ids, key=key)
        if error is not None:
            sequence.fail(error)
        return sequence, GenerationOutput(prompt=request.prompt, prompt_token_ids=ids)

    def _encode(self, prompt: Prompt) -> list[int]:
        parse = self.config.parse_special_tokens
        ids = encode_prompt(prompt, self.tokenizer, parse_special_tokens=parse)
        if not parse and is_text(prompt) and names_special_token(prompt, self.tokenizer):
            if self.stats.special_names == 0:
                logger.warning(
                    "the text of a prompt holds the name of a special token, which is read as plain characters; where "
                    "prompts are rendered templates, set parse_special_tokens. Prompt: %.80r",
                    prompt,
                )
            self.stats.special_names += 1
        return ids

    def _fit(self, context: list[int], max_tokens: int, servers: Mapping[str, EngineInfo | None]) -> list[int]:
        """What of a prompt the servers, by their models' names, have room for: all of it, unless the config allows."""
        fitted = context
        for name, info in servers.items():
            if info is None or info.max_model_len is None:
                continue
            room = info.max_model_len - max_tokens - 1  # a server scores a text by generating one token more
            if len(fitted) <= room:
                continue
            if self.config.long_prompts == "refuse" or room < 1:
                raise ValueError(
                    f"{name} sees a prompt of {len(context)} tokens; with max_tokens={max_tokens} and one more for "
                    f"scoring that exceeds its context of {info.max_model_len}. Shorten the prompt, lower max_tokens, "
                    'raise --max-model-len, or set long_prompts to "truncate_left".'
                )
            fitted = fitted[-room:]
        if len(fitted) < len(context):
            if self.stats.truncated_prompts == 0:
                logger.warning(
                    "a prompt of %d tokens is cut to its last %d, for long_prompts is truncate_left",
                    len(context),
                    len(fitted),
                )
            self.stats.truncated_prompts += 1
        return fitted

    def _find_tokenizer(self, info: EngineInfo, *, needed: bool) -> None:
        """Load the configured tokenizer, or else the one of π_θ's model; that is downloaded only where needed."""
        if self.tokenizer is not None or (self._tokenizer_sought and not needed):
            return
        self._tokenizer_sought = True
        name = self.config.tokenizer or info.root or info.model
        wanted = needed or self.config.tokenizer is not None
        try:
            self.tokenizer = load_tokenizer(name, local_files_only=not wanted)
        except Exception as error:  # of a damaged file the tokenizers library raises just that
            if wanted:
                raise ValueError(
                    f"no tokenizer found at {name!r}, set tokenizer to its name or path: {error}"
                ) from error
            logger.warning(
                "no tokenizer found at %r: nothing is decoded and no EOS is known (set tokenizer, or pass "
                "stop_token_ids)",
                name,
            )

    async def _preflight(self, sequences: list[DecodingSequence], name: str | None, config: CoordinatorConfig) -> bool:
        """Before the first batch: a misconfigured server fails here, once. Whether the target's is there."""
        if self._native is not None:
            await self._native.attach(config.temperature)
            return True
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        if name == NO_TARGET:
            await check_policy(self.theta, config, contexts_theta)
            return True
        target = self._targets[name]
        if not target.checked and not await self._check_target(target, config, contexts_theta, contexts_t):
            return False
        if config.decoding == "block" and config.temperature != 1.0 and not target.tuner.processed:
            raise PreflightError(
                f'decoding="block" at temperature {config.temperature:g} needs the law that drafts are drawn from, but '
                f"the server at theta_url ({self.theta.url}) reports raw log-probabilities. Start it with "
                '--logprobs-mode processed_logprobs, or set decoding to "lockstep".'
            )
        return True

    async def _check_target(
        self,
        target: _Target,
        config: CoordinatorConfig,
        contexts_theta: Sequence[TokenIds],
        contexts_t: Sequence[TokenIds],
    ) -> bool:
        """Whether its server is there, and then that it and π_θ's can give what is asked."""

        async def check() -> None:
            theta, t = await check_servers(
                self.theta, target.engine, config, contexts_theta, contexts_t, flag=target.flag
            )
            target.tuner.scoring, target.tuner.processed = t.scoring, theta.logprobs_mode == "processed"

        try:
            await (until_back(check, target.engine.url) if config.on_target_failure == "wait" else check())
        except EngineUnavailableError as error:
            if config.on_target_failure != "policy" or error.url != target.engine.url:
                raise
            logger.warning("going on without the target (on_target_failure is policy): %s", error)
            return False
        target.checked = True
        return True

    def _fill(self, output: GenerationOutput, sequence: DecodingSequence) -> None:
        output.generated_tokens = sequence.tokens
        if self.tokenizer is not None:
            try:
                output.generated_text = decode_tokens(sequence.tokens, self.tokenizer)
            except ValueError as error:
                sequence.fail(error)
        output.finish_reason = sequence.finish_reason if sequence.failure is None else None
        output.error = None if sequence.failure is None else str(sequence.failure)
        output.alpha_history = sequence.alpha
        output.logprobs_q = sequence.log_q
        output.logprobs_theta = sequence.logp_theta
        output.logprobs_t = sequence.logp_t
        output.importance_weights = np.exp(sequence.log_weight).tolist()
        output.without_target = sequence.without_target
        output.weight_versions = sequence.weight_versions
        for name, values in sequence.diagnostics.items():
            known = np.array(values)[~np.isnan(values)]  # tokens without a target have some unknown
            output.diagnostics[name] = values
            output.diagnostics[f"{name}_mean"] = float(known.mean()) if len(known) else math.nan
            output.diagnostics[f"{name}_max"] = float(known.max()) if len(known) else math.nan


async def generate_with_optimal_sampling(
    prompts: Sequence[Prompt], config: CoordinatorConfig, *, max_tokens: int = 256, **options: Any
) -> list[GenerationOutput]:
    """`generate_batch` in one call: opens a coordinator, generates, closes it. Options as there."""
    async with DualVLLMCoordinator(config) as coordinator:
        return await coordinator.generate_batch(prompts, max_tokens=max_tokens, **options)


async def ask_target(ask: Callable[[], Awaitable[T]], url: str, on_target_failure: str) -> T | None:
    """What π_t's server at `url` says to `ask`; None where it is gone and the sequences go on without."""
    if on_target_failure == "wait":
        return await until_back(ask, url)
    try:
        return await ask()
    except EngineUnavailableError as error:
        if on_target_failure != "policy":
            raise
        logger.warning("%s: the target is not there (on_target_failure is policy)", error)
        return None


def _shares(counts: list[int], limit: int) -> list[int]:
    """Of `limit` places, those of each target: at least one, else in proportion to its sequences."""
    shares = [-(-limit * count // sum(counts)) for count in counts]
    while sum(shares) > limit and max(shares) > 1:
        shares[shares.index(max(shares))] -= 1
    return shares


def _chunk(sequence: DecodingSequence, decoder: IncrementalDecoder | None) -> StreamChunk:
    token = sequence.tokens[-1]
    log_weight = sequence.log_weight[-1]
    if np.isnan(log_weight):
        log_weight = sequence.logp_theta[-1] - sequence.log_q[-1]
    return StreamChunk(
        token_id=token,
        text=decoder.push(token, last=sequence.done) if decoder is not None else "",
        alpha=sequence.alpha[-1],
        logprob_q=sequence.log_q[-1],
        importance_weight=float(np.exp(log_weight)),
        finish_reason=sequence.finish_reason,
    )


def _progress(show: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not show, desc="q* rollouts", unit="seq")
