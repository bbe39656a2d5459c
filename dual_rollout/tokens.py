"""Do two servers speak the same tokens? Compared from their tokenizers' files, or else by asking the servers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers import Capabilities, Engine

_SHOWN = 5
_SAMPLED_IDS = 256
_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What a tokenizer's files say.

    Attributes:
        ids: token → id, added tokens included.
        roles: "eos_token" and the like → token.
        chat_template: a Jinja template.
    """

    ids: Mapping[str, int]
    roles: Mapping[str, str]
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Of two tokenizers.

    Attributes:
        same: whether each id that both have means the same; None where that could not be found out.
        differences: the first five ids that do not.
        notes: what differs without harm, or why nothing is known.
    """

    same: bool | None
    differences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


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


def read_vocabulary(root: str) -> Vocabulary | None:
    """The tokenizer in a folder, or of a hub name in the local cache; None where there is no tokenizer.json."""
    path = _file(root, "tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer  # not transformers: its import takes seconds

    config_path, template_path = _file(root, "tokenizer_config.json"), _file(root, "chat_template.jinja")
    config: dict[str, Any] = json.loads(config_path.read_text()) if config_path else {}
    template = template_path.read_text() if template_path else config.get("chat_template")
    roles = {role: config[role] for role in _ROLES if config.get(role)}
    return Vocabulary(
        Tokenizer.from_file(str(path)).get_vocab(with_added_tokens=True),
        {role: token["content"] if isinstance(token, dict) else token for role, token in roles.items()},
        template if isinstance(template, str) else None,
    )


def compare_vocabularies(theta: Vocabulary, t: Vocabulary) -> Comparison:
    """Ids that only one tokenizer has are no difference: embeddings are often padded, and tokens added at the end."""
    names_theta, names_t = ({i: token for token, i in vocabulary.ids.items()} for vocabulary in (theta, t))
    differences = [
        f"id {i} is {names_theta[i]!r} for π_θ and {names_t[i]!r} for π_t"
        for i in sorted(names_theta.keys() & names_t.keys())
        if names_theta[i] != names_t[i]
    ] or [
        f"{token!r} has id {theta.ids[token]} for π_θ and {t.ids[token]} for π_t"
        for token in sorted(theta.ids.keys() & t.ids.keys())
        if theta.ids[token] != t.ids[token]
    ]
    notes = []
    for name, only in (("π_θ", theta.ids.keys() - t.ids.keys()), ("π_t", t.ids.keys() - theta.ids.keys())):
        if only:
            notes.append(f"{len(only)} tokens only {name} has, such as {min(only)!r}")
    for role in _ROLES:
        if theta.roles.get(role) != t.roles.get(role):
            notes.append(f"{role} is {theta.roles.get(role)!r} for π_θ and {t.roles.get(role)!r} for π_t")
    if theta.chat_template != t.chat_template:
        notes.append("the chat templates differ; π_θ's renders the prompts of both")
    return Comparison(not differences, tuple(differences[:_SHOWN]), tuple(notes))


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
            if len(wrong) < _SHOWN and await differ([i]):
                texts = await asyncio.gather(theta.detokenize([i]), t.detokenize([i]))
                wrong.append(f"id {i} is {texts[0]!r} for π_θ and {texts[1]!r} for π_t")
    except (EngineRejectedError, EngineProtocolError) as error:
        return Comparison(None, notes=(f"not checked: {error}",))
    return Comparison(False, tuple(wrong), (f"compared by the texts of {len(sample)} ids alone",))


def _file(root: str, name: str) -> Path | None:
    """A file of a model's folder, or of a hub name in the local cache."""
    if Path(root).is_dir():
        path = Path(root) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(root, name)
    except ValueError:  # not a name of the hub; a folder on another machine
        return None
    return Path(found) if isinstance(found, str) else None
