"""Do two servers speak the same tokens? Compared from their tokenizers' files, or else by asking the servers."""

from __future__ import annotations

import asyncio

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers import Capabilities, Engine
from dual_rollout.tokenizer_files import SHOWN, Comparison, compare_vocabularies, read_vocabulary

_SAMPLED_IDS = 256


async def compare_tokens(
    theta: Engine, t: Engine, theta_capabilities: Capabilities, t_capabilities: Capabilities
) -> Comparison:
    """Compare the tokenizers of π_θ's and π_t's servers.

    Raises:
        EngineUnavailableError: a server cannot be reached.
    """
    roots = theta_capabilities.root, t_capabilities.root
    if roots[0] is not None and roots[0] == roots[1]:
        return Comparison(True, notes=(f"both serve {roots[0]}",))
    vocabularies = [await asyncio.to_thread(read_vocabulary, root) if root else None for root in roots]
    if vocabularies[0] is not None and vocabularies[1] is not None:
        return compare_vocabularies(vocabularies[0], vocabularies[1])
    if theta_capabilities.detokenizes and t_capabilities.detokenizes:
        return await _compare_texts(theta, t, theta_capabilities.vocab_size, t_capabilities.vocab_size)
    return Comparison(None, notes=("not checked: the tokenizers are not on this machine, nor behind /detokenize",))


async def _compare_texts(theta: Engine, t: Engine, size_theta: int | None, size_t: int | None) -> Comparison:
    """By the texts that the servers give for some ids, spread over the vocabulary where its size is known."""
    size = min(size_theta or size_t or _SAMPLED_IDS, size_t or size_theta or _SAMPLED_IDS)
    sample = sorted({i * size // _SAMPLED_IDS for i in range(_SAMPLED_IDS)})

    async def differ(ids: list[int]) -> bool:
        texts = await asyncio.gather(theta.detokenize(ids), t.detokenize(ids))
        return texts[0] != texts[1]

    try:
        if not await differ(sample):
            return Comparison(True, notes=(f"compared by the texts of {len(sample)} ids alone",))
        wrong: list[str] = []
        for i in sample:
            if len(wrong) < SHOWN and await differ([i]):
                texts = await asyncio.gather(theta.detokenize([i]), t.detokenize([i]))
                wrong.append(f"id {i} is {texts[0]!r} for π_θ and {texts[1]!r} for π_t")
    except (EngineRejectedError, EngineProtocolError) as error:
        return Comparison(None, notes=(f"not checked: {error}",))
    return Comparison(False, tuple(wrong), (f"compared by the texts of {len(sample)} ids alone",))
