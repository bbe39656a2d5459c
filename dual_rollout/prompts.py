"""Prompts before they are tokens: one form for all, and what π_t sees instead. Training and production use the same."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from dual_rollout.types import Prompt

_MEDIA = ("image", "video", "audio")


def is_text(prompt: Prompt) -> bool:
    """Whether a prompt is a string or chat messages, which need a tokenizer."""
    if isinstance(prompt, str):
        return True
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def as_text(prompt: Any) -> str | None:
    """A prompt to be read by people: a string as it is, messages under their roles, ids as numbers; None for None."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if not is_text(prompt):
        return " ".join(map(str, prompt))
    return "\n".join(f"{message.get('role')}: {_content_text(message)}" for message in without_nulls(prompt))


def _content_text(message: Mapping[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(part.get("text", "") if isinstance(part, Mapping) else str(part) for part in content)
    calls = message.get("tool_calls")
    return "" if content is None and not calls else f"{content or ''}{f' {calls}' if calls else ''}"


def without_nulls(prompt: Any) -> Any:
    """Chat messages without the null keys, at any depth, that Arrow adds where one has a key and others lack it.

    Templates ask whether a key is there. The `content` of a message stays, since a turn of tool calls may have none.
    A prompt of another form is returned as it is.
    """
    if not (isinstance(prompt, (list, tuple)) and prompt and isinstance(prompt[0], Mapping)):
        return prompt
    return [
        {**_drop_nulls(message), **({"content": None} if message.get("content", "") is None else {})}
        if isinstance(message, Mapping)
        else message
        for message in prompt
    ]


def chat_messages(prompt: Sequence[Any]) -> list[dict[str, Any]]:
    """Messages in the one form that is given to chat templates: checked, without null keys, parts as mappings.

    A turn of tool calls without `content` has it as None; a part that is a string becomes a part of type "text".

    Raises:
        ValueError: a message without a role, content of another type, or media; says which message.
    """
    for i, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(f'message {i} must be a mapping with a "role" and a "content"')
        _check_content(i, message)
    messages = without_nulls(prompt)
    for message in messages:
        if isinstance(message.setdefault("content", None), list):
            message["content"] = [_text_part(part) if isinstance(part, str) else part for part in message["content"]]
    return messages


def check_prompt_is_text(prompt: Prompt) -> None:
    """Refuse messages that hold media, which only a trainer's own model would see; token ids and strings pass.

    Raises:
        ValueError: as for `chat_messages`.
    """
    if is_text(prompt) and not isinstance(prompt, str):
        chat_messages(prompt)


def template_columns(template: str) -> list[str]:
    """The columns that a template names in braces, as `{answer}` or as a part of one, `{reward_model[truth]}`.

    Raises:
        ValueError: braces that hold no such name.
    """
    columns = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if spec or conversion:
            written = f"{name}{f'!{conversion}' if conversion else ''}{f':{spec}' if spec else ''}"
            raise ValueError(f"{written!r} in braces is no column")
        if name is not None:
            columns.append(re.split(r"[.[]", name)[0])
    return columns


def target_prompt(
    row: Mapping[str, Any],
    *,
    template: str | None = None,
    system_prompt: str | None = None,
    prompt_column: str = "prompt",
    t_prompt_column: str | None = "t_prompt",
) -> Prompt:
    """What π_t sees of a row: its `t_prompt`, or else its `prompt`, with turns of its own.

    Args:
        row: at least the prompt, a string or chat messages.
        template: replaces the last turn (a prompt that is a string: all of it); the row's columns in braces.
        system_prompt: the system turn, in place of the prompt's own if it has one; the row's columns in braces.

    Raises:
        ValueError: a template whose braces hold no column of the row, or one that is null there; an empty prompt, or
            one of token ids; a system turn for a prompt that is a string.
    """
    own = None if t_prompt_column is None else row.get(t_prompt_column)
    prompt: Any = without_nulls(row[prompt_column] if own is None else own)
    if template is None and system_prompt is None:
        return prompt
    if prompt is None or len(prompt) == 0:
        raise ValueError("the prompt is empty: at least one token is needed")
    if not is_text(prompt):
        raise ValueError(
            "t_prompt_template and t_system_prompt need prompts of text or chat messages, not of token ids"
        )
    if template is not None:
        text = _fill(template, row, "t_prompt_template")
        prompt = text if isinstance(prompt, str) else [*prompt[:-1], _turn("user", text, like=prompt[-1])]
    if system_prompt is not None:
        if isinstance(prompt, str):
            raise ValueError("t_system_prompt needs prompts that are chat messages; use t_prompt_template for strings")
        turns = prompt[1:] if prompt[0].get("role") == "system" else prompt
        prompt = [_turn("system", _fill(system_prompt, row, "t_system_prompt"), like=prompt[0]), *turns]
    return prompt


def _fill(template: str, row: Mapping[str, Any], name: str) -> str:
    try:
        for column in template_columns(template):
            if column not in row:
                raise ValueError(f"{column!r} is none of the dataset's columns {', '.join(row)}")
            if row[column] is None:
                raise ValueError(f"the column {column!r} is null in a row: fill it, or leave the row out")
        return template.format(**row)
    except (ValueError, LookupError, AttributeError) as error:
        raise ValueError(
            f"{name} {template!r}: {error}. Columns stand in braces; write {{{{ and }}}} for braces themselves"
        ) from error


def _turn(role: str, text: str, *, like: Any) -> dict[str, Any]:
    """A turn whose content is a string or a list of parts, as that of a turn of the same prompt: templates take one."""
    in_parts = isinstance(like, Mapping) and isinstance(like.get("content"), list)
    return {"role": role, "content": [_text_part(text)] if in_parts else text}


def _text_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def _check_content(i: int, message: Mapping[str, Any]) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, list) or not all(isinstance(part, (str, Mapping)) for part in content):
        raise ValueError(f"the content of message {i} must be a string or a list of parts, got {content!r:.80}")
    for part in content:
        if isinstance(part, Mapping) and any(media in str(part.get("type")) for media in _MEDIA):
            raise ValueError(
                f"message {i} of a prompt has a part of type {part['type']!r}, and rollouts from q* are of text alone"
            )


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, (list, tuple)):
        return [_drop_nulls(item) for item in value]
    return value
