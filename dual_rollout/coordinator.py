"""`DualVLLMCoordinator`: prompts in, sequences from q* out."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Self

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding import (
    Choice,
    DecodingSequence,
    DecodingStats,
    NativeDecoder,
    OnToken,
    Recorder,
    Tuner,
    decode,
)
from dual_rollout.engines import Engine, EngineInfo, HttpStats, HttpTransport, NativeEngine, SGLangEngine, VLLMEngine
from dual_rollout.preflight import check_servers
from dual_rollout.text import IncrementalDecoder, encode_prompt, is_text, load_tokenizer, stop_token_ids
from dual_rollout.types import GenerationOutput, Prompt, StreamChunk

logger = logging.getLogger(__name__)

_MAX_PROMPTS_PER_REQUEST = 1024  # vLLM refuses longer lists
_STREAMED_BLOCK = 16  # tokens a native server draws per request while streaming
_ENGINES: dict[str, Callable[[HttpTransport, str | None], Engine]] = {"vllm": VLLMEngine, "sglang": SGLangEngine}


@dataclass(slots=True)
class CoordinatorStats:
    """Totals over a coordinator's life; `seconds` is the time spent inside generate calls."""

    decoding: DecodingStats = field(default_factory=DecodingStats)
    theta: HttpStats = field(default_factory=HttpStats)
    t: HttpStats = field(default_factory=HttpStats)
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.decoding.tokens / self.seconds if self.seconds else 0.0

    @property
    def retries(self) -> int:
        return self.theta.retries + self.t.retries


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
        weight_version: the version of π_θ's weights, for the outputs to record; set by whoever changes the weights.

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
        self._transports = [self._transport(config.theta_url), self._transport(config.t_url)]
        self._native: NativeEngine | None = None
        if config.engine == "native":
            self._native = NativeEngine(self._transports[0], config.theta_model)
            self.theta: Engine = self._native
            self.t: Engine = self._native
        else:
            self.theta = _ENGINES[config.theta_engine](self._transports[0], config.theta_model)
            self.t = _ENGINES[config.t_engine](self._transports[1], config.t_model)
        self.stats = CoordinatorStats(theta=self._transports[0].stats, t=self._transports[1].stats)
        self.weight_version: int | None = None
        self._tuner = Tuner()
        self._tokenizer_sought = False
        self._checked = False

    @property
    def chosen(self) -> Choice | None:
        """What `decoding: auto` found fastest at the latest load; `tuning` says why."""
        return self._tuner.chosen

    @property
    def tuning(self) -> dict[str, dict[str, float]]:
        """Tokens per second measured for each way to decode, by load."""
        return self._tuner.report()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        for transport in self._transports:
            await transport.aclose()

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        t_prompts: Sequence[Prompt] | None = None,
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
            temperature, seed: override the config's for this call.
            stop_token_ids: stop at these too, besides EOS.
            return_diagnostics: fill `GenerationOutput.diagnostics`.

        Raises:
            ValueError: wrong arguments.
            PreflightError: the servers cannot serve what the config asks.
        """
        config = self._call_config(temperature, seed)
        sequences, outputs = await self._sequences(prompts, t_prompts, max_tokens, stop_token_ids, config)
        running = [sequence for sequence in sequences if not sequence.done]
        await self._preflight(running, config)
        started = time.perf_counter()
        with _progress(config.show_progress, total=len(prompts)) as bar:
            await self._decode(
                running,
                config,
                with_diagnostics=return_diagnostics,
                on_token=lambda sequence: bar.update() if sequence.done else None,
            )
        self.stats.seconds += time.perf_counter() - started
        for sequence, output in zip(sequences, outputs, strict=True):
            self._fill(output, sequence)
        return outputs

    async def generate_stream(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        t_prompt: Prompt | None = None,
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
        (sequence,), _ = await self._sequences([prompt], t_prompts, max_tokens, stop_token_ids, config)
        if sequence.failure is not None:
            raise sequence.failure
        await self._preflight([sequence], config)
        decoder = IncrementalDecoder(self.tokenizer) if self.tokenizer is not None else None
        chunks: asyncio.Queue[StreamChunk | None] = asyncio.Queue()

        async def run() -> None:
            try:
                await self._decode(
                    [sequence],
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

    async def _decode(
        self,
        sequences: list[DecodingSequence],
        config: CoordinatorConfig,
        *,
        on_token: OnToken,
        with_diagnostics: bool = False,
        max_block: int | None = None,
    ) -> None:
        """Decode all sequences to their end; `max_block` is how many tokens a native server draws per request."""
        stats = self.stats.decoding
        if self._native is not None:
            await NativeDecoder(self._native, config, stats, with_diagnostics, max_block, on_token).decode(sequences)
        else:
            recorder = Recorder(self.theta, self.t, config, stats, with_diagnostics=with_diagnostics, on_token=on_token)
            await decode(sequences, recorder, self._tuner)

    def _transport(self, url: str) -> HttpTransport:
        config = self.config
        return HttpTransport(
            url,
            max_retries=config.max_retries,
            request_timeout=config.request_timeout,
            total_timeout=config.total_timeout,
            pool_size=config.connection_pool_size,
        )

    def _call_config(self, temperature: float | None, seed: int | None) -> CoordinatorConfig:
        config = self.config
        return replace(
            config,
            temperature=config.temperature if temperature is None else temperature,
            seed=config.seed if seed is None else seed,
        )

    async def _sequences(
        self,
        prompts: Sequence[Prompt],
        t_prompts: Sequence[Prompt] | None,
        max_tokens: int,
        stop_ids: Collection[int],
        config: CoordinatorConfig,
    ) -> tuple[list[DecodingSequence], list[GenerationOutput]]:
        """Tokenise once, check lengths, and give each sequence its own random stream."""
        if self._native is not None and t_prompts is not None:
            raise ValueError('engine "native" shows both models one prompt: t_prompts need engine "dual"')
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of prompts; got one string")
        if t_prompts is not None and len(t_prompts) != len(prompts):
            raise ValueError(f"t_prompts must have one entry per prompt: {len(t_prompts)} for {len(prompts)} prompts")
        if not isinstance(max_tokens, int) or max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number >= 1, got {max_tokens!r}")
        infos = await asyncio.gather(self.theta.describe(), self.t.describe())
        self._find_tokenizer(infos[0], needed=any(is_text(p) for p in [*prompts, *(t_prompts or [])]))
        stops = frozenset(stop_ids)
        if self.tokenizer is not None and not config.ignore_eos:
            stops |= stop_token_ids(self.tokenizer)
        entropy = secrets.randbits(64) if config.seed is None else config.seed

        sequences, outputs = [], []
        for i, prompt in enumerate(prompts):
            error, ids, ids_t = None, list[int](), list[int]()
            try:
                ids = encode_prompt(prompt, self.tokenizer)
                ids_t = ids if t_prompts is None else encode_prompt(t_prompts[i], self.tokenizer)
                for context, info, name in ((ids, infos[0], "π_θ"), (ids_t, infos[1], "π_t")):
                    _check_length(context, max_tokens, info, name)
            except ValueError as fault:
                error = fault
            sequence = DecodingSequence(ids, ids_t, max_tokens=max_tokens, stop_ids=stops, key=(entropy % 2**64, i))
            if error is not None:
                sequence.fail(error)
            sequences.append(sequence)
            outputs.append(GenerationOutput(prompt=prompt, prompt_token_ids=ids, weight_version=self.weight_version))
        return sequences, outputs

    def _find_tokenizer(self, info: EngineInfo, *, needed: bool) -> None:
        """Load the configured tokenizer, or else the one of π_θ's model; that is downloaded only where needed."""
        if self.tokenizer is not None or (self._tokenizer_sought and not needed):
            return
        self._tokenizer_sought = True
        name = self.config.tokenizer or info.root or info.model
        wanted = needed or self.config.tokenizer is not None
        try:
            self.tokenizer = load_tokenizer(name, local_files_only=not wanted)
        except (OSError, ValueError) as error:
            if wanted:
                raise ValueError(
                    f"no tokenizer found at {name!r}, set tokenizer to its name or path: {error}"
                ) from error
            logger.warning(
                "no tokenizer found at %r: nothing is decoded and no EOS is known (set tokenizer, or pass "
                "stop_token_ids)",
                name,
            )

    async def _preflight(self, sequences: list[DecodingSequence], config: CoordinatorConfig) -> None:
        """Before the first batch: a misconfigured server fails here, once."""
        if self._native is not None:
            await self._native.attach(config.temperature)
            return
        if self._checked or not sequences:
            return
        contexts_theta = [sequence.context_theta for sequence in sequences]
        contexts_t = [sequence.context_t for sequence in sequences]
        await check_servers(self.theta, self.t, config, contexts_theta, contexts_t)
        self._checked = True

    def _fill(self, output: GenerationOutput, sequence: DecodingSequence) -> None:
        output.generated_tokens = sequence.tokens
        if self.tokenizer is not None:
            output.generated_text = self.tokenizer.decode(sequence.tokens, skip_special_tokens=True)
        output.finish_reason = sequence.finish_reason if sequence.failure is None else None
        output.error = None if sequence.failure is None else str(sequence.failure)
        output.alpha_history = sequence.alpha
        output.logprobs_q = sequence.log_q
        output.logprobs_theta = sequence.logp_theta
        output.logprobs_t = sequence.logp_t
        output.importance_weights = np.exp(sequence.log_weight).tolist()
        for name, values in sequence.diagnostics.items():
            output.diagnostics[name] = values
            output.diagnostics[f"{name}_mean"] = float(np.mean(values))
            output.diagnostics[f"{name}_max"] = float(np.max(values))


async def generate_with_optimal_sampling(
    prompts: Sequence[Prompt], config: CoordinatorConfig, *, max_tokens: int = 256, **options: Any
) -> list[GenerationOutput]:
    """`generate_batch` in one call: opens a coordinator, generates, closes it. Options as there."""
    async with DualVLLMCoordinator(config) as coordinator:
        return await coordinator.generate_batch(prompts, max_tokens=max_tokens, **options)


def _check_length(context: list[int], max_tokens: int, info: EngineInfo, name: str) -> None:
    limit = info.max_model_len
    # A server scores a text by generating one token more.
    if limit is not None and len(context) + max_tokens >= limit:
        raise ValueError(
            f"{name} sees a prompt of {len(context)} tokens; with max_tokens={max_tokens} and one more for scoring "
            f"that exceeds its context of {limit}. Shorten the prompt, lower max_tokens, or raise --max-model-len."
        )


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
