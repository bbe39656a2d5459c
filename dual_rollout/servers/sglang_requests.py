"""Requests to an SGLang server's /generate, which may be sent again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from dual_rollout.engine import TokenIds
from dual_rollout.exceptions import EngineProtocolError
from dual_rollout.servers.http import HttpTransport, longest_answer
from dual_rollout.servers.identity import ServerIdentity
from dual_rollout.servers.parsing import RequestIds, read_as
from dual_rollout.servers.sglang_answers import SGLangParser

T = TypeVar("T")

# SGLang fills what is not said from --preferred-sampling-params, so everything is said. Temperature 0 is not used: it
# means top_k=1, and in some versions another request's min_p in the same step then cuts our lists to one token.
_PLAIN_SAMPLING = {
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "repetition_penalty": 1.0,
    "ignore_eos": True,
}


class SGLangRequests:
    """Sends requests to one server, again as `RetryPolicy` says.

    Every prompt is numbered (`rid`), and its answer must be to that one.
    """

    def __init__(self, http: HttpTransport, identity: ServerIdentity, parser: SGLangParser):
        self._http = http
        self._identity = identity
        self._parser = parser
        self._ids = RequestIds()

    async def generate(
        self,
        prompts: Sequence[TokenIds],
        sampling: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        read: Callable[[list[Mapping[str, Any]]], T],
        *,
        watched: bool = True,
        **options: Any,
    ) -> T:
        """What `read` makes of the `meta_info` of what is generated after each prompt, in order.

        `sampling` is for all or one for each. `watched`: the answer must be of the server that was there at first.

        Raises:
            EngineRejectedError: the server refuses one of the prompts, or an option.
            EngineProtocolError: no answer was of use, however often the request was sent.
            EngineRestartedError: the server has lost the weights that it was given.
            EngineReplacedError: it serves another model than at first.
        """
        if watched:
            await self._identity.before_request()
        payload: dict[str, Any] = {
            "input_ids": prompts,
            "sampling_params": sampling,
            "return_logprob": True,
            "return_text_in_logprobs": False,
            **options,
        }
        max_bytes = longest_answer(len(prompts), _listed(prompts, payload))

        async def once() -> T:
            numbers = [self._ids.next() for _ in prompts]
            answers = await self._http.post("/generate", {**payload, "rid": numbers}, max_bytes=max_bytes)
            if watched:
                await self._identity.after_answer()
            if not isinstance(answers, list) or len(answers) != len(prompts):
                raise EngineProtocolError(f"expected a list of {len(prompts)} answers", url=self._http.url)
            metas = [
                self._parser.meta_info(answer, prompt, partial(self._ids.fit, "/generate", number=number))
                for answer, prompt, number in zip(answers, prompts, numbers, strict=True)
            ]
            return read_as(read, metas, self._http.url)

        return await self._http.retries.query(once)


def sampling(**changes: Any) -> dict[str, Any]:
    """Sampling parameters: one token from the model's own distribution, but for `changes`."""
    return {**_PLAIN_SAMPLING, **changes}


def _listed(prompts: Sequence[TokenIds], payload: Mapping[str, Any]) -> int:
    """Log-probabilities that an answer to this request has at most."""
    sampling = payload["sampling_params"]
    each = sampling if isinstance(sampling, list) else [sampling] * len(prompts)
    names = payload.get("token_ids_logprob", [()] * len(prompts))
    starts = payload.get("logprob_start_len", map(len, prompts))
    starts = [starts] * len(prompts) if isinstance(starts, int) else starts
    width = 1 + payload.get("top_logprobs_num", 0)
    return sum(
        (len(prompt) - start + options["max_new_tokens"]) * (width + len(named))
        for prompt, start, options, named in zip(prompts, starts, each, names, strict=True)
    )
