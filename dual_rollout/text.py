"""Text in, text out: chat templates, tokenisation and incremental decoding, once, on the client."""

from __future__ import annotations

import copy
import functools
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from dual_rollout.prompts import chat_messages, is_text
from dual_rollout.types import Prompt


def load_tokenizer(name: str, *, local_files_only: bool = False) -> Any:
    """The tokenizer of a model folder or hub name (imports transformers, hence late).

    Raises:
        OSError, ValueError: there is none under that name.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, local_files_only=local_files_only, trust_remote_code=False)


def with_template_options(tokenizer: Any, options: Mapping[str, Any]) -> Any:
    """The tokenizer, with further arguments for its chat template."""
    if not options:
        return tokenizer
    bound = copy.copy(tokenizer)
    bound.apply_chat_template = functools.partial(tokenizer.apply_chat_template, **options)
    return bound


def encode_prompt(prompt: Any, tokenizer: Any, *, parse_special_tokens: bool = False) -> list[int]:
    """Token ids of a prompt: chat messages through the model's own template, strings as they are, ids checked.

    Args:
        parse_special_tokens: whether a special token's name inside a string or a message, such as `<|im_start|>`, is
            that token. Otherwise it is the characters it is written with, and only the template and the tokenizer
            itself place special tokens, so that whoever wrote the text cannot end a turn or speak for the system.

    Raises:
        ValueError: an empty prompt, wrong types, or text without a tokenizer or template.
    """
    if not is_text(prompt):
        if isinstance(prompt, bytes) or not isinstance(prompt, Sequence) or not all(map(_is_token_id, prompt)):
            raise ValueError("a prompt must be a string, a list of chat messages, or a list of token ids >= 0")
        ids = list(prompt)
    elif tokenizer is None:
        raise ValueError("a text prompt needs a tokenizer: set tokenizer to its name or path, or pass token ids")
    elif isinstance(prompt, str):
        ids = _encode_string(prompt, tokenizer, parse_special_tokens)
    else:
        try:
            ids = _encode_chat(prompt, tokenizer, parse_special_tokens)
        except RecursionError as error:
            raise ValueError("the chat messages are nested too deeply") from error
    if not ids:
        raise ValueError("the prompt is empty: at least one token is needed")
    return ids


def names_special_token(prompt: Prompt, tokenizer: Any) -> bool:
    """Whether a string or a chat message holds the name of a special token."""
    names = _special_names(tokenizer)
    return names is not None and any(names.search(text) for text in _strings(prompt))


def decode_tokens(ids: Sequence[int], tokenizer: Any) -> str:
    """The text of generated tokens, without special ones.

    Raises:
        ValueError: ids that the tokenizer does not have, as a server with another vocabulary may send.
    """
    try:
        return tokenizer.decode(ids, skip_special_tokens=True)
    except Exception as error:  # tokenizers raise OverflowError, TypeError and what their authors chose
        raise ValueError(f"the tokenizer cannot decode the tokens that came, {list(ids)!r:.80}: {error}") from error


class IncrementalDecoder:
    """Text of a growing token list. Bytes of an unfinished character are held back until it is complete."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown = 0  # ids whose text has been handed out
        self._context = 0  # earlier ids decoded along, since some tokenizers drop a leading space

    def push(self, token: int, *, last: bool = False) -> str:
        """The text that `token` completes; possibly empty. The `last` token brings out what is held back."""
        self._ids.append(token)
        before = decode_tokens(self._ids[self._context : self._shown], self._tokenizer)
        text = decode_tokens(self._ids[self._context :], self._tokenizer)
        unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and not last
        if unfinished or len(text) <= len(before):
            return ""
        self._context, self._shown = self._shown, len(self._ids)
        return text[len(before) :]


def _encode_string(text: str, tokenizer: Any, parse_special_tokens: bool) -> list[int]:
    if not text:  # a tokenizer that puts a BOS first would make one token of it
        raise ValueError("the prompt is empty: at least one token is needed")
    _check_unicode(text)
    if not parse_special_tokens and names_special_token(text, tokenizer):
        _check_plain(tokenizer(text, split_special_tokens=True, add_special_tokens=False)["input_ids"], tokenizer)
    ids = list(tokenizer(text, split_special_tokens=not parse_special_tokens)["input_ids"])
    # A rendered template has its BOS, and the tokenizer would put another one before it.
    return ids[1:] if parse_special_tokens and ids[:2] == [tokenizer.bos_token_id] * 2 else ids


def _encode_chat(prompt: Any, tokenizer: Any, parse_special_tokens: bool) -> list[int]:
    messages = chat_messages(prompt)
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template: use a chat model's "
            "tokenizer, set its chat_template, or pass strings"
        )
    if parse_special_tokens or not names_special_token(messages, tokenizer):
        return list(tokenizer(_render(messages, tokenizer), add_special_tokens=False)["input_ids"])
    return _encode_plain_chat(messages, tokenizer)


def _encode_plain_chat(messages: Any, tokenizer: Any) -> list[int]:
    """Token ids of messages that hold names of special tokens, with those of the template alone made special.

    The messages' are hidden while the template is rendered; then the template's get names that no text holds, the
    messages' come back, and a tokenizer that knows the special tokens by their new names alone reads the whole.
    """
    from tokenizers import AddedToken, Tokenizer

    if not tokenizer.is_fast:
        raise ValueError(
            "a message holds the name of a special token, which only fast tokenizers can read as plain text: take it "
            "out, or set parse_special_tokens to have it parsed"
        )
    names = _special_names(tokenizer)
    assert names is not None
    _check_parts(messages, names)
    nonce = secrets.token_hex(8)
    hidden: list[str] = []

    def hide(match: re.Match[str]) -> str:
        hidden.append(match[0])
        return f"u{nonce}u{len(hidden) - 1}u"

    rendered = _render(_map_strings(messages, lambda text: names.sub(hide, text)), tokenizer)
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    renamed = {token.content: f"s{nonce}s{number}s" for number, token in added.items() if token.special}
    rendered = names.sub(lambda match: renamed[match[0]], rendered)
    rendered = re.sub(f"u{nonce}u([0-9]+)u", lambda match: hidden[int(match[1])], rendered)

    reader = Tokenizer(tokenizer.backend_tokenizer.model)
    for part in ("normalizer", "pre_tokenizer"):
        if getattr(tokenizer.backend_tokenizer, part) is not None:
            setattr(reader, part, getattr(tokenizer.backend_tokenizer, part))
    original: dict[int, int] = {}
    for number, token in sorted(added.items()):
        name = renamed.get(token.content, token.content)
        options = {flag: getattr(token, flag) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        reader.add_tokens([AddedToken(name, **options)])
        placed = reader.token_to_id(name)
        assert placed is not None
        original[placed] = number
    ids = reader.encode(rendered, add_special_tokens=False).ids
    _check_plain([number for number in ids if number not in original], tokenizer)
    return [original.get(number, number) for number in ids]


def _check_plain(ids: Sequence[int], tokenizer: Any) -> None:
    """Refuse text that the tokenizer's own vocabulary, and not only its added tokens, makes special."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    if special.difference([tokenizer.unk_token_id]).intersection(ids):
        raise ValueError(
            "the prompt holds the name of a special token, which this tokenizer cannot read as plain text: take it "
            "out, or set parse_special_tokens to have it parsed"
        )


def _special_names(tokenizer: Any) -> re.Pattern[str] | None:
    """Matches the names of the tokenizer's special tokens, the longest first."""
    names = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True)))) if names else None


def _render(messages: Sequence[Mapping[str, Any]], tokenizer: Any) -> str:
    """The rendered template. A turn of tool calls is given without its null `content`, for templates that print it, and
    with it to a template that cannot do without."""
    without = [{k: v for k, v in message.items() if k != "content" or v is not None} for message in messages]
    render = functools.partial(tokenizer.apply_chat_template, add_generation_prompt=True, tokenize=False)
    try:
        try:
            text = render(without)
        except Exception:
            if without == messages:
                raise
            text = render(messages)
    except Exception as error:  # templates raise whatever their authors chose
        raise ValueError(f"the tokenizer's chat template does not take these messages: {error}") from error
    _check_unicode(text)
    return text


def _check_parts(messages: Sequence[Any], names: re.Pattern[str]) -> None:
    """Refuse what cannot be hidden from a template: a name that comes about when it joins the parts of a message."""
    for i, message in enumerate(messages):
        texts = _part_texts(message["content"]) if isinstance(message.get("content"), list) else []
        if len(names.findall("".join(texts))) != sum(len(names.findall(text)) for text in texts):
            raise ValueError(
                f"the content of message {i} spreads the name of a special token over several parts: make one part of "
                "them, or set parse_special_tokens to have it parsed"
            )


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from error


def _strings(value: Any) -> Iterator[str]:
    """All strings in a prompt, and the parts of a message's content as one, for templates put them together."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
        if isinstance(parts := value.get("content"), list):
            yield "".join(_part_texts(parts))
    elif isinstance(value, Sequence) and not isinstance(value, bytes):
        for item in value:
            yield from _strings(item)


def _part_texts(parts: list[Any]) -> list[str]:
    return [part["text"] for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str)]


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return [_map_strings(item, change) for item in value]
    return value


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31
