"""Prompts, settings and commands that nobody should send: each is refused in words, or read as plain text."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dual_rollout import CoordinatorConfig
from dual_rollout.exceptions import DEBUG_VARIABLE, EngineError, exit_status
from dual_rollout.text import encode_prompt, names_special_token
from tests.tiny_model import SPECIAL_TOKENS, make_tokenizer

TOKENIZER = make_tokenizer()
SPECIAL_IDS = set(TOKENIZER.convert_tokens_to_ids(list(SPECIAL_TOKENS)))
PLAIN = st.text(st.sampled_from("ab Zé🙂\n\t<|>_imstarend/"), max_size=30)
HOSTILE = st.lists(st.sampled_from([*SPECIAL_TOKENS, "the ", " ", "\n", "<|", "im_start|>", "é"]), max_size=8).map(
    "".join
)
ROLES = st.sampled_from(["system", "user", "assistant"])


def messages(content: st.SearchStrategy[str]) -> st.SearchStrategy[list[dict[str, str]]]:
    return st.lists(st.fixed_dictionaries({"role": ROLES, "content": content}), min_size=1, max_size=4)


def template_ids(prompt: Any, tokenizer: Any = TOKENIZER) -> list[int]:
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]


def metaspace_tokenizer() -> PreTrainedTokenizerFast:
    """Of SentencePiece's kind: a space is put before the first word of a text, and not after a special token."""
    characters = "▁abcdefghijklmnopqrstuvwxyz<|>_\nZé🙂/\t"
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(characters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TOKENIZER.chat_template
    return tokenizer


METASPACE = metaspace_tokenizer()


# ---- special tokens in text -----------------------------------------------------------------------------------------


@given(messages(PLAIN))
def test_ordinary_messages_are_what_the_template_makes_of_them(prompt):
    for tokenizer in (TOKENIZER, METASPACE):
        assert encode_prompt(prompt, tokenizer) == template_ids(prompt, tokenizer)


@given(messages(HOSTILE))
def test_special_tokens_in_messages_are_plain_text(prompt):
    """The special tokens are those of the same messages without any text, and every character is still there."""
    ids = encode_prompt(prompt, TOKENIZER)
    empty = template_ids([{**message, "content": ""} for message in prompt])
    assert [token for token in ids if token in SPECIAL_IDS] == [token for token in empty if token in SPECIAL_IDS]
    rendered = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    assert TOKENIZER.decode(ids) == rendered
    assert encode_prompt(prompt, TOKENIZER, parse_special_tokens=True) == template_ids(prompt)


@given(messages(HOSTILE))
def test_plain_reading_changes_nothing_around_it(prompt):
    """A name is replaced by one that is not special: all else must be the tokens that the tokenizer itself gives."""
    for tokenizer in (TOKENIZER, METASPACE):
        harmless = [{**m, "content": m["content"].replace("<", "é") + "<|im_end|>"} for m in prompt]
        reference = [{**m, "content": m["content"].replace("<", "é") + "<|im_e_d|>"} for m in prompt]
        ids = encode_prompt(harmless, tokenizer)
        letters = [tokenizer.convert_tokens_to_ids(letter) for letter in "n_"]
        changed = iter(template_ids(reference, tokenizer))
        for token in ids:
            other = next(changed)
            assert token == other or [token, other] == letters
        assert next(changed, None) is None


@given(HOSTILE.filter(bool))
def test_special_tokens_in_strings_are_plain_text(prompt):
    ids = encode_prompt(prompt, TOKENIZER)
    assert not SPECIAL_IDS.intersection(ids)
    assert TOKENIZER.decode(ids) == prompt
    assert encode_prompt(prompt, TOKENIZER, parse_special_tokens=True) == TOKENIZER(prompt)["input_ids"]


def test_special_tokens_hide_nowhere_in_a_message():
    prompt = [
        {"role": "user<|im_end|>", "content": "a"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"<pad>": "x"}}}],
        },
    ]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ m | tojson }}{% endfor %}"
    ids = encode_prompt(prompt, tokenizer)
    assert [token for token in ids if token in SPECIAL_IDS] == [tokenizer.convert_tokens_to_ids("<|im_start|>")] * 2
    assert '"<pad>": "x"' in tokenizer.decode(ids) and "user<|im_end|>" in tokenizer.decode(ids)


def test_special_tokens_do_not_form_between_parts():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    parts = [{"type": "text", "text": text} for text in ("a<|im_", "start|>b")]
    with pytest.raises(ValueError, match=r"message 0 spreads the name of a special token .* parse_special_tokens"):
        encode_prompt([{"role": "user", "content": parts}], tokenizer)


def test_a_vocabulary_that_has_no_plain_reading_is_refused():
    """A unigram model finds </s> among its pieces, whatever the added tokens are."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((c, -5.0) for c in "a</s>")]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    assert encode_prompt("aa", tokenizer) == [2, 2]
    for prompt in ("a</s>", [{"role": "user", "content": "a</s>"}]):
        with pytest.raises(ValueError, match="cannot read as plain text"):
            encode_prompt(prompt, tokenizer)
        assert 1 in encode_prompt(prompt, tokenizer, parse_special_tokens=True)


@given(st.one_of(PLAIN, HOSTILE, messages(HOSTILE)))
def test_names_are_found_where_they_are(prompt):
    assert names_special_token(prompt, TOKENIZER) == any(name in repr(prompt) for name in SPECIAL_TOKENS)


# ---- prompts of any kind --------------------------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.binary(max_size=4)
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "role", "content", "text", *SPECIAL_TOKENS]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["role", "content", "text", "type"]) | st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=12,
)


@given(ANYTHING | st.lists(st.fixed_dictionaries({"role": ROLES, "content": ANYTHING})))
def test_any_prompt_is_token_ids_or_a_value_error(prompt):
    before = copy.deepcopy(prompt)
    try:
        ids = encode_prompt(prompt, TOKENIZER)
    except ValueError:
        pass
    else:
        assert ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)
    assert repr(prompt) == repr(before)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"abc", "token ids"),
        ([2**31], "token ids"),
        ("a\ud800", "not valid Unicode"),
        ([{"role": "user", "content": "\udfff"}], "not valid Unicode"),
        ([{"role": "user"}], "content of message 0"),
        ([{"role": "user", "content": 5}], "content of message 0"),
        ([{"role": "user", "content": [5]}], "content of message 0"),
        ([{"content": "a"}], 'message 0 must be a mapping with a "role"'),
        ([{"role": "user", "content": "a"}, "b"], "message 1 must be a mapping"),
    ],
)
def test_prompts_that_are_refused_in_words(prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, TOKENIZER)


def test_messages_without_an_end():
    message: dict[str, Any] = {"role": "user", "content": "a"}
    message["self"] = [message]
    with pytest.raises(ValueError, match="nested too deeply"):
        encode_prompt([message], TOKENIZER)


def test_templates_may_raise_anything():
    tokenizer = make_tokenizer()
    for template in (
        "{{ 1 / 0 }}",
        "{{ messages.nothing.at_all }}",
        "{% endfor %}",
        "{{ messages[0]['content'] + 1 }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="chat template does not take these messages"):
            encode_prompt([{"role": "user", "content": "a"}], tokenizer)


# ---- settings -------------------------------------------------------------------------------------------------------

NAMES = [spec.name for spec in dataclasses.fields(CoordinatorConfig)]


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=5) | st.integers(), ANYTHING, max_size=4))
def test_any_mapping_is_a_config_or_a_value_error(values):
    mistake = None
    try:
        config = CoordinatorConfig.from_dict(values)
    except ValueError as error:
        mistake = str(error)
    if mistake is not None:
        assert any(str(name) in mistake or repr(name) in mistake for name in [*values, "dual", "native"])
    else:
        for name, value in values.items():
            assert name.endswith("_url") or name == "targets" or getattr(config, name) == value


# ---- commands -------------------------------------------------------------------------------------------------------


def raising(error: Exception):
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("words"), 2), (OSError("words"), 2), (EngineError("words", url="http://a"), 1)],
)
def test_mistakes_are_one_line_unless_debugging(error, status, capsys, monkeypatch):
    assert exit_status("dual-rollout x", raising(error)) == status
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"dual-rollout x: error: {error}\n")
    with pytest.raises(type(error)):
        exit_status("dual-rollout x", raising(error), debug=True)
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    with pytest.raises(type(error)):
        exit_status("dual-rollout x", raising(error))


def test_bugs_keep_their_traceback():
    with pytest.raises(AssertionError):
        exit_status("dual-rollout x", raising(AssertionError("bug")))
    assert exit_status("dual-rollout x", lambda: 3) == 3
    assert exit_status("dual-rollout x", lambda: None) == 0
