"""What a tokenizer's files say, and whether two of them mean the same by the same ids."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHOWN = 5
"""Differences that are named."""

_MOST_RENAMED = 0.01  # of the ids that both have
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
    """Ids that only one tokenizer has are no difference: embeddings are often padded, and tokens added at the end. Nor
    are a few renamed tokens, as special ones between a base model and its child: neither has the other's name."""
    names_theta, names_t = ({i: token for token, i in vocabulary.ids.items()} for vocabulary in (theta, t))
    common = sorted(names_theta.keys() & names_t.keys())
    differing = [i for i in common if names_theta[i] != names_t[i]]
    renamed = [i for i in differing if names_theta[i] not in t.ids and names_t[i] not in theta.ids]
    if len(renamed) > _MOST_RENAMED * len(common):
        renamed = []

    def named(ids: list[int]) -> list[str]:
        return [f"id {i} is {names_theta[i]!r} for π_θ and {names_t[i]!r} for π_t" for i in ids[:SHOWN]]

    differences = named([i for i in differing if i not in set(renamed)]) or [
        f"{token!r} has id {theta.ids[token]} for π_θ and {t.ids[token]} for π_t"
        for token in sorted(theta.ids.keys() & t.ids.keys())
        if theta.ids[token] != t.ids[token]
    ]
    notes = [f"{len(renamed)} tokens have another name: {'; '.join(named(renamed))}"] if renamed else []
    for name, only in (("π_θ", theta.ids.keys() - t.ids.keys()), ("π_t", t.ids.keys() - theta.ids.keys())):
        if only:
            notes.append(f"{len(only)} tokens only {name} has, such as {min(only)!r}")
    for role in _ROLES:
        if theta.roles.get(role) != t.roles.get(role):
            notes.append(f"{role} is {theta.roles.get(role)!r} for π_θ and {t.roles.get(role)!r} for π_t")
    if theta.chat_template != t.chat_template:
        notes.append("the chat templates differ; π_θ's renders the prompts of both")
    return Comparison(not differences, tuple(differences[:SHOWN]), tuple(notes))


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
