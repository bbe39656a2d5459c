"""`DualVLLMCoordinator`: requests in, a sampler chosen for each, outputs out."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, Unpack

import numpy as np

from dual_rollout.config import CoordinatorConfig
from dual_rollout.decoding.call import OnToken
from dual_rollout.decoding.sequence import DecodingSequence
from dual_rollout.decoding.stats import DecodingStats
from dual_rollout.decoding.weight_version import PolicyWeights
from dual_rollout.exceptions import EngineUnavailableError
from dual_rollout.prompt_encoder import PromptEncoder
from dual_rollout.samplers.dispatch import Call, Dispatcher
from dual_rollout.samplers.from_config import choose_samplers
from dual_rollout.servers.from_config import Clients
from dual_rollout.stats import CoordinatorStats
from dual_rollout.text import IncrementalDecoder, decode_tokens
from dual_rollout.types import CallOptions, GenerationOutput, GenerationRequest, Prompt, StreamChunk

_MAX_PROMPTS_PER_REQUEST = 1024  # vLLM refuses longer lists


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
        servers: the policy's server and the target's, to be described and examined.
        theta: the client of the policy's server, which takes new weights.
        t: the client of the server at `t_url`, or of the policy's where that holds the target too.
        stats: counts and times.

    Raises:
        PreflightError: from the first call, when the servers cannot serve what `config` asks.
    """

    def __init__(self, config: CoordinatorConfig, *, tokenizer: Any = None):
        if config.concurrency > _MAX_PROMPTS_PER_REQUEST:
            raise ValueError(f"max_concurrency must be at most {_MAX_PROMPTS_PER_REQUEST}, got {config.concurrency}")
        self.config = config
        self._clients = Clients(config)
        self._weights = PolicyWeights()
        decoding = DecodingStats()
        samplers = choose_samplers(config, self._clients, self._weights, decoding)
        self.servers = samplers.servers
        self.theta, self.t = samplers.servers.theta, samplers.servers.t
        self.stats = CoordinatorStats.of(decoding, samplers.traffic)
        self.stats.tuners = samplers.tuners
        self._prompts = PromptEncoder(config, tokenizer, self.stats.prompts)
        self._dispatcher = Dispatcher(samplers.by_target, self._prompts)
        self.targets: Collection[str | None] = samplers.by_target.keys()
        """What requests may name as their target; "none" is among them where the policy can be asked alone."""

    @property
    def tokenizer(self) -> Any:
        """What encodes prompts and decodes completions; None before it was needed, or where there is none."""
        return self._prompts.tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Any) -> None:
        self._prompts.tokenizer = tokenizer

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt, whether or not there is room for it. `tokenizer` must be set for text.

        Raises:
            ValueError: a prompt that cannot be encoded.
        """
        return self._prompts.encode(prompt, 0, {})

    @property
    def weight_version(self) -> int | None:
        """The version of π_θ's weights, for the outputs to record. Whoever changes them between rollouts sets it."""
        return self._weights.version

    @weight_version.setter
    def weight_version(self, version: int | None) -> None:
        self._weights.version = version

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections."""
        await self._clients.aclose()

    async def generate_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        t_prompts: Sequence[Prompt | None] | None = None,
        targets: Sequence[str | None] | None = None,
        **options: Unpack[CallOptions],
    ) -> list[GenerationOutput]:
        """One sequence from q* per prompt, in order. A prompt that fails has its `error` set; the others go on.

        Args:
            prompts: strings, chat message lists or token-id lists, as π_θ sees them.
            t_prompts: what π_t sees instead, one per prompt (privileged context), None where it is what π_θ sees; the
                completion is shared.
            targets: which π_t, one per prompt: a name in `config.targets`, or None for the one at `t_url`. "none" is no
                target: plain generation from π_θ, with α = 0, log q* = log π_θ, weight exactly 1, log π_t NaN.
            options: `max_tokens` and others, see `CallOptions`.

        Raises:
            ValueError: wrong arguments.
            PreflightError: the servers cannot serve what the config asks.
        """
        check_entries(prompts, t_prompts=t_prompts, targets=targets)
        nothing = [None] * len(prompts)
        rows = zip(prompts, t_prompts or nothing, targets or nothing, strict=True)
        return await self.generate_requests([GenerationRequest(i, *row) for i, row in enumerate(rows)], **options)

    async def generate_requests(
        self, requests: Sequence[GenerationRequest], **options: Unpack[CallOptions]
    ) -> list[GenerationOutput]:
        """As `generate_batch`, of requests, each of which may have a `max_tokens` and a seed of its own."""
        for request in requests:
            self._dispatcher.sampler_of(request)  # what none can draw is refused before the first token
        call, outputs = self._call(options), dict[int, GenerationOutput]()
        with _progress(self.config.show_progress, total=len(requests)) as bar:
            async for request, sequence in self._draw(requests, call, look_ahead=len(requests)):
                outputs[request.index] = self._output(request, sequence)
                bar.update()
        return [outputs[request.index] for request in requests]

    async def generate_iter(
        self, requests: Iterable[GenerationRequest], **options: Unpack[CallOptions]
    ) -> AsyncGenerator[tuple[int, GenerationOutput]]:
        """The index and the output of each request as it finishes, in no particular order; for inputs of any length.

        A request is taken from the iterable when its sequence is about to begin, and `max_concurrency` are in flight
        at all times. When the outputs are not taken, no new sequences begin. With a seed the output of a request does
        not depend on the others, nor on whether there are any.

        Args:
            requests: what to draw.
            options: `max_tokens` and others, see `CallOptions`.

        Raises:
            ValueError: wrong arguments.
            PreflightError: the servers cannot serve what the config asks.
            EngineUnavailableError: a server is gone for longer than the retries allow: what comes after would fail too.
        """
        drawn = self._draw(requests, self._call(options), look_ahead=self.config.concurrency)
        try:
            async for request, sequence in drawn:
                if isinstance(sequence.failure, EngineUnavailableError):
                    raise sequence.failure
                yield request.index, self._output(request, sequence)
        finally:
            await drawn.aclose()

    async def generate_stream(
        self,
        prompt: Prompt,
        *,
        t_prompt: Prompt | None = None,
        target: str | None = None,
        **options: Unpack[CallOptions],
    ) -> AsyncIterator[StreamChunk]:
        """The tokens of one sequence as they are sampled. Arguments as in `generate_batch`.

        Raises:
            ValueError: wrong arguments, or a prompt that cannot be generated from.
            DualRolloutError: a server's fault, after the chunks that came before it.
        """
        request = GenerationRequest(0, prompt, t_prompt, target)
        self._dispatcher.sampler_of(request)
        chunks: asyncio.Queue[StreamChunk | None] = asyncio.Queue()
        decoder: IncrementalDecoder | None = None

        def on_token(sequence: DecodingSequence) -> None:
            nonlocal decoder
            if decoder is None and self.tokenizer is not None:
                decoder = IncrementalDecoder(self.tokenizer)
            chunks.put_nowait(_chunk(sequence, decoder))

        call = self._call(options, on_token)

        async def run() -> Exception | None:
            try:
                ((_, sequence),) = [found async for found in self._draw([request], call, look_ahead=1)]
                return sequence.failure
            finally:
                chunks.put_nowait(None)

        task = asyncio.create_task(run())
        try:
            while (chunk := await chunks.get()) is not None:
                yield chunk
            failure = await task
        finally:
            task.cancel()
        if failure is not None:
            raise failure

    async def _draw(
        self, requests: Iterable[GenerationRequest], call: Call, *, look_ahead: int
    ) -> AsyncGenerator[tuple[GenerationRequest, DecodingSequence]]:
        """`Dispatcher.draw`, with the time that it takes."""
        started, drawn = time.perf_counter(), self._dispatcher.draw(requests, call, look_ahead=look_ahead)
        try:
            async for found in drawn:
                yield found
        finally:
            await drawn.aclose()
            self.stats.seconds += time.perf_counter() - started

    def _call(self, options: CallOptions, on_token: OnToken | None = None) -> Call:
        """The options of a call, checked."""
        unknown = sorted(options.keys() - CallOptions.__annotations__.keys())
        if unknown:
            raise TypeError(f"unknown option {', '.join(unknown)}: known are {', '.join(CallOptions.__annotations__)}")
        max_tokens, stop_token_ids = options.get("max_tokens", 256), options.get("stop_token_ids", ())
        if not isinstance(max_tokens, int) or isinstance(max_tokens, bool) or max_tokens < 1:
            raise ValueError(f"max_tokens must be a whole number >= 1, got {max_tokens!r}")
        eos_token_ids = options.get("eos_token_ids")
        for name, ids in (("stop_token_ids", stop_token_ids), ("eos_token_ids", eos_token_ids or ())):
            if not isinstance(ids, Collection) or not all(isinstance(token, int) for token in ids):
                raise ValueError(f"{name} must be token ids, got {ids!r}")
        given = {name: options.get(name) for name in ("temperature", "seed")}
        config = replace(self.config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        if (rule := options.get("alpha_rule")) is not None:
            config = config.with_alpha_rule(rule)
        if (
            eos_token_ids is not None and not config.ignore_eos
        ):  # they are stop ids, and what the model calls EOS is none
            stop_token_ids, config = {*stop_token_ids, *eos_token_ids}, replace(config, ignore_eos=True)
        entropy = secrets.randbits(64) if config.seed is None else config.seed % 2**64
        return Call(config, max_tokens, stop_token_ids, entropy, options.get("return_diagnostics", False), on_token)

    def _output(self, request: GenerationRequest, sequence: DecodingSequence) -> GenerationOutput:
        text, tokens = None, sequence.tokens
        if self.tokenizer is not None:
            try:
                text = decode_tokens(tokens, self.tokenizer)
            except ValueError as error:
                sequence.fail(error)
        return GenerationOutput(
            prompt=request.prompt,
            prompt_token_ids=list(sequence.context_theta[: len(sequence.context_theta) - len(tokens)]),
            record=sequence.record,
            generated_text=text,
            finish_reason=sequence.finish_reason if sequence.failure is None else None,
            error=None if sequence.failure is None else str(sequence.failure),
        )


async def generate_with_optimal_sampling(
    prompts: Sequence[Prompt], config: CoordinatorConfig, *, max_tokens: int = 256, **options: Any
) -> list[GenerationOutput]:
    """`generate_batch` in one call: opens a coordinator, generates, closes it. Options as there."""
    async with DualVLLMCoordinator(config) as coordinator:
        return await coordinator.generate_batch(prompts, max_tokens=max_tokens, **options)


def check_entries(prompts: Sequence[Prompt], **lists: Sequence[Any] | None) -> None:
    """Refuse prompts that are no list, and other lists, by their names, that have not one entry for each prompt."""
    if not _is_list(prompts):
        raise ValueError(f"prompts must be a list of prompts, one entry per prompt; got one {type(prompts).__name__}")
    for name, given in lists.items():
        if given is not None and not (_is_list(given) and len(given) == len(prompts)):
            raise ValueError(f"{name} must have one entry per prompt: got {given!r:.80} for {len(prompts)} prompts")


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _chunk(sequence: DecodingSequence, decoder: IncrementalDecoder | None) -> StreamChunk:
    record, token = sequence.record, sequence.tokens[-1]
    return StreamChunk(
        token_id=token,
        text=decoder.push(token, last=sequence.done) if decoder is not None else "",
        alpha=record.alpha[-1],
        logprob_q=record.logprobs_q[-1],
        importance_weight=float(np.exp(sequence.last_log_weight)),
        finish_reason=sequence.finish_reason,
    )


def _progress(show: bool, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, disable=not show, desc="q* rollouts", unit="seq")
