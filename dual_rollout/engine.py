"""The contract of a server: what the decoding loops ask of it (`ScoringEngine`), and how the policy's gets new weights
(`WeightReceiver`). The clients in `dual_rollout.servers` implement both; nothing here knows of HTTP."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from dual_rollout.functional.top_k import TopK

TokenIds = Sequence[int]
T = TypeVar("T")


class GrowingText(list[int]):
    """A text that grows by what is sampled.

    Attributes:
        replica: the one of several servers that has its beginning cached.
        grows: whether it will be asked for again, longer; False for a piece of another one.
    """

    replica: object = None
    grows = True

    @classmethod
    def like(cls, other: TokenIds, token_ids: TokenIds) -> GrowingText:
        """Another text with the same beginning as `other`, and so for the same replica."""
        context = cls(token_ids)
        context.replica = getattr(other, "replica", None)
        context.grows = False
        return context


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What a server says of the model it serves.

    Attributes:
        model: the name to use in requests.
        root: path or hub name of the weights, where the server tells; the default tokenizer.
        max_model_len: context length in tokens, where the server tells.
        owned_by: who says to serve it: "vllm", or "dual_rollout" for the embedded server.
    """

    model: str
    root: str | None
    max_model_len: int | None
    owned_by: str | None = None


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafted tokens of several sequences.

    Attributes:
        token_ids: one int64 array per sequence; R tokens in all.
        lists: `(R, K)` the most likely tokens at each position, sequence after sequence.
    """

    token_ids: list[np.ndarray]
    lists: TopK


_SENDING_ONCE = contextvars.ContextVar("_SENDING_ONCE", default=False)


@contextlib.contextmanager
def sent_once() -> Iterator[None]:
    """Requests that are made inside are sent once: whoever makes them tries again by other means, or not at all."""
    token = _SENDING_ONCE.set(True)
    try:
        yield
    finally:
        _SENDING_ONCE.reset(token)


def sending_once() -> bool:
    """Whether this is inside `sent_once`."""
    return _SENDING_ONCE.get()


def prefixes(prompts: Sequence[TokenIds], drafts: Sequence[np.ndarray]) -> list[GrowingText]:
    """What precedes each position of each draft, R texts in all."""
    return [
        GrowingText.like(prompt, [*prompt, *draft[:end].tolist()])
        for prompt, draft in zip(prompts, drafts, strict=True)
        for end in range(len(draft))
    ]


ScoringMethod = Literal["token_ids", "prefixes", "prompt_logprobs"]
"""How a drafted block is scored: by the token-in/token-out endpoint, computing what follows the cached prefix; as one
prompt per prefix, which the prefix cache makes cheap; or by rows for the whole prompt, computed anew."""

NamedRowsForm = Literal["per row", "shared"]
"""What names the tokens that are scored along a text: one list for each row, or one list for all of them."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a server is and can do, as measured by `Engine.probe`. None where it could not be found out.

    Attributes:
        model, root, max_model_len: as in `EngineInfo`.
        version: of the server's software.
        vocab_size: rows of the model's output, padding included.
        max_logprobs: longest list of log-probabilities it gives; None for no limit met.
        prompt_lists: it takes several prompts in one request.
        logprobs_mode: "processed" when log-probabilities follow the temperature, else "raw".
        named_logprobs: it reports log-probabilities of tokens that the request names.
        prefix_caching: it reuses what it has computed for a common prefix.
        generate_endpoint: it has a token-in/token-out endpoint.
        cached_rows: asked for the prompt's log-probabilities after a prefix-cache hit, that endpoint gives the right
            rows for what was not cached; False also where asking is known to be dangerous.
        named_rows: how that endpoint is told the tokens whose log-probabilities it reports along a text
            (`prompt_logprob_token_ids`); None where it does not, or gives wrong ones.
        sessions: it keeps texts between requests (`dual_rollout.sessions`), and gives the same lists for them.
        detokenizes: it has /detokenize.
        reloads_weights, resets_prefix_cache, pauses, loads_lora: it can do so while it runs.
        scoring: the ways to score a drafted block, the most promising first.
        refused: what it says to offer, and refused to the probe, with its words; slower ways are taken instead.
    """

    model: str
    root: str | None = None
    max_model_len: int | None = None
    version: str | None = None
    vocab_size: int | None = None
    max_logprobs: int | None = None
    prompt_lists: bool = True
    logprobs_mode: Literal["raw", "processed"] = "raw"
    named_logprobs: bool = False
    prefix_caching: bool | None = None
    generate_endpoint: bool = False
    cached_rows: bool = False
    named_rows: NamedRowsForm | None = None
    sessions: bool = False
    detokenizes: bool = False
    reloads_weights: bool = False
    resets_prefix_cache: bool = False
    pauses: bool = False
    loads_lora: bool = False
    scoring: tuple[ScoringMethod, ...] = ("prefixes",)
    refused: tuple[str, ...] = ()

    def names_tokens_at(self, temperature: float) -> bool:
        """Whether it reports named tokens at `temperature`."""
        return self.named_logprobs and (temperature == 1.0 or self.logprobs_mode == "processed")


class ScoringEngine(Protocol):
    """One model behind a server, asked for probabilities and draws.

    All methods raise the errors of `dual_rollout.exceptions`.
    """

    url: str

    async def describe(self) -> EngineInfo:
        """The served model; asked once, then remembered."""
        ...

    async def probe(self, prompt: TokenIds) -> Capabilities:
        """What the server is and can do, measured with a few short requests made of `prompt`'s tokens; once."""
        ...

    async def next_top_k(self, prompts: Sequence[TokenIds], k: int, temperature: float = 1.0) -> TopK:
        """The k most likely next tokens after each of B prompts, in one request; at most k per row."""
        ...

    async def draft(
        self,
        prompts: Sequence[TokenIds],
        lengths: Sequence[int],
        k: int,
        temperature: float,
        seeds: Sequence[int],
        stop_ids: Collection[int] = (),
    ) -> Drafts:
        """Continuations drawn from the model, with the lists that they were drawn from.

        Args:
            lengths: tokens of each, at most.
            k: tokens of each list.
            seeds: one for each; the same prompt, length and seed give the same tokens.
            stop_ids: a draft ends with the first of these. It may end at the model's own EOS too, and has at least one
                token.

        Raises:
            EngineRejectedError: a prompt or k is more than the server takes.
            EngineProtocolError: no answer was what was asked for, however often the request was sent.
        """
        ...

    async def score_drafts(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        k: int,
        temperature: float,
        method: ScoringMethod,
    ) -> TopK:
        """The k most likely tokens at each position of each draft, given what precedes it; `(R, K)` as in `Drafts`.

        All methods that `probe` finds give the same; which is faster depends on the server and the load.

        Raises:
            EngineRejectedError: a text or k is more than the server takes, or it lacks the method.
            EngineProtocolError: rows are missing or wrong, however often the request was sent.
        """
        ...

    async def named_logprobs(
        self, prompts: Sequence[TokenIds], token_ids: Sequence[TokenIds], temperature: float = 1.0
    ) -> list[np.ndarray]:
        """Log-probabilities of named next tokens: for each prompt an array as long as its `token_ids`."""
        ...

    async def score_named(
        self,
        prompts: Sequence[TokenIds],
        drafts: Sequence[np.ndarray],
        token_ids: Sequence[TokenIds],
        temperature: float = 1.0,
    ) -> list[np.ndarray]:
        """Log-probabilities of named tokens at each position of each draft, given what precedes it; nats.

        `token_ids` has one list per position, R in all as in `Drafts`; the answer an array as long as each, `-inf` for
        what is impossible.

        Raises:
            EngineRejectedError: a text is longer than the server takes, a token unknown to it, or, at temperature != 1,
                its log-probabilities do not follow the temperature.
            EngineProtocolError: the server does not report named tokens.
        """
        ...

    async def score(self, token_ids: TokenIds, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities, at temperature 1, of the tokens of one text from position `start` on.

        Returns `(own, top)`, both `(len(token_ids) - start,)` float64: the token's own log-probability given what
        precedes it, and that of the most likely token there.
        """
        ...

    async def draw_excluding(
        self, prompts: Sequence[TokenIds], excluded: Sequence[TokenIds], temperature: float, seeds: Sequence[int]
    ) -> list[int]:
        """One next token after each prompt, drawn from the model where its `excluded` are as unlikely as can be made.

        They come the likeliest first, for servers that take only so many. The caller rejects an excluded token and
        draws again with another seed; so the draw stays exact even where a server ignores the exclusion.
        """
        ...


class WeightReceiver(Protocol):
    """The policy's server, where it gets new weights. All methods raise the errors of `dual_rollout.exceptions`."""

    url: str

    async def reset_prefix_cache(self) -> None:
        """Forget everything computed for earlier requests."""
        ...

    async def reload_weights(self, path: str) -> None:
        """Load the weights in folder `path` (safetensors), then drop the prefix cache.

        Requests in flight are finished with the old weights, new ones wait, where the server can do so.
        """
        ...

    async def load_lora(self, name: str, path: str) -> None:
        """Load the LoRA adapter in folder `path` under `name`, then drop the prefix cache."""
        ...

    def use_lora(self, name: str) -> None:
        """From now on ask for the model with this adapter."""
        ...

    async def loads_lora(self) -> bool:
        """Whether the server takes LoRA adapters while it runs."""
        ...

    async def check_sees(self, path: str) -> None:
        """Raise unless the server can read folder `path`, which holds a safetensors file without tensors."""
        ...

    def weights_given(self) -> Any:
        """What another process must know to notice when the server loses the weights given here; picklable."""
        ...

    def adopt_weights(self, given: Any) -> None:
        """From now on take the server to have the weights that another process gave it, whose `weights_given` it is."""
        ...

    async def weight_version(self) -> str | None:
        """The name that the server's weights were last given, "default" for those that it was started with.

        None where the server has no place for a name. Several are asked by `Engine.each`.
        """
        ...

    async def dtype(self) -> str | None:
        """What the server computes in, "bfloat16", or how its weights are quantised, "fp8"; None if it does not say."""
        ...

    async def set_weight_version(self, version: str) -> None:
        """Name the weights that the server has now, for all who ask; nothing where it has no place for a name."""
        ...


class Engine(ScoringEngine, WeightReceiver, Protocol):
    """A client of a server in both roles, with what is asked of the server as such."""

    async def each(self, ask: Callable[[Engine], Awaitable[T]]) -> list[T]:
        """The answers of all servers behind this engine: of itself, or of its replicas that are in use."""
        ...

    async def software_version(self) -> str | None:
        """The version of what runs as the server; None where it does not say."""
        ...

    async def detokenize(self, token_ids: TokenIds) -> str:
        """The server's text of these tokens."""
        ...

    async def health(self) -> None:
        """Return if the health check of the server passes."""
        ...
