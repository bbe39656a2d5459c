from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dual_rollout.stop_tokens import stop_token_ids
from dual_rollout.text import IncrementalDecoder, encode_prompt, is_text, load_tokenizer
from tests.tiny_model import make_tokenizer

TOKENIZER = make_tokenizer()
CHAT = [{"role": "user", "content": "héllo"}]


def byte_ids(data: bytes) -> list[int]:
    """One token per byte, whatever merges the tokenizer has."""
    from tokenizers import pre_tokenizers

    symbols = {}
    for byte in range(256):  # the byte-level alphabet: printable bytes are themselves, the rest follow from U+0100 on
        printable = 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255
        symbols[byte] = chr(byte) if printable else chr(256 + sum(c >= "Ā" for c in symbols.values()))
    assert set(symbols.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return TOKENIZER.convert_tokens_to_ids([symbols[byte] for byte in data])


def pieces(ids: list[int]) -> list[str]:
    decoder = IncrementalDecoder(TOKENIZER)
    return [decoder.push(token, last=i == len(ids) - 1) for i, token in enumerate(ids)]


@given(st.text(min_size=1))
def test_characters_split_over_tokens(text):
    ids = byte_ids(text.encode("utf-8", "replace"))
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=60))
def test_any_tokens_decode_to_the_final_text(ids):
    """Invalid UTF-8, merges and special tokens included."""
    assert "".join(pieces(ids)) == TOKENIZER.decode(ids, skip_special_tokens=True)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), min_size=1, max_size=40))
def test_what_was_shown_is_never_taken_back(ids):
    decoder, shown = IncrementalDecoder(TOKENIZER), ""
    final = TOKENIZER.decode(ids, skip_special_tokens=True)
    for token in ids:
        shown += decoder.push(token)
        assert final.startswith(shown)


def test_a_character_appears_when_its_last_byte_does():
    assert pieces(byte_ids("a€b".encode())) == ["a", "", "", "€", "b"]
    assert pieces(byte_ids("🙂".encode())) == ["", "", "", "🙂"]


def test_an_unfinished_character_comes_with_the_last_token():
    assert pieces(byte_ids(b"a\xe2\x82")) == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_strings_are_taken_as_they_are():
    text = "the user\nand 🙂"
    assert TOKENIZER.decode(encode_prompt(text, TOKENIZER)) == text


def test_chat_messages_go_through_the_template():
    ids = encode_prompt(CHAT, TOKENIZER)
    assert TOKENIZER.decode(ids) == "<|im_start|>user\nhéllo<|im_end|>\n<|im_start|>assistant\n"
    assert all(type(token) is int for token in ids)


def test_token_ids_are_copied_and_need_no_tokenizer():
    prompt = (5, 6, 7)
    assert encode_prompt(prompt, None) == [5, 6, 7]
    mutable = [5, 6]
    assert encode_prompt(mutable, None) is not mutable


@pytest.mark.parametrize(
    ("prompt", "text"), [("a", True), ("", True), (CHAT, True), ([1], False), ([], False), (5, False), (None, False)]
)
def test_what_needs_a_tokenizer(prompt, text):
    assert is_text(prompt) is text


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ([], "empty"),
        ([-1], ">= 0"),
        ([1.0], "token ids"),
        ([True], "token ids"),
        (["a"], "token ids"),
        ([[1, 2]], "token ids"),
        (5, "token ids"),
        (None, "token ids"),
    ],
)
def test_bad_prompts_are_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        encode_prompt(prompt, TOKENIZER)


@pytest.mark.parametrize("prompt", ["text", CHAT])
def test_text_without_a_tokenizer_says_what_to_set(prompt):
    with pytest.raises(ValueError, match="set tokenizer"):
        encode_prompt(prompt, None)


def test_chat_without_a_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        encode_prompt(CHAT, tokenizer)


def test_messages_the_template_refuses():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="System role not supported"):
        encode_prompt(CHAT, tokenizer)


@pytest.mark.parametrize(("eos", "expected"), [(7, {7}), ([7, 8], {7, 8}), (None, set()), ("absent", set())])
def test_end_of_sequence_of_tokenizer_and_generation_config(tmp_path, eos, expected):
    make_tokenizer().save_pretrained(tmp_path)
    if eos != "absent":
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    tokenizer = load_tokenizer(str(tmp_path), local_files_only=True)
    assert stop_token_ids(tokenizer) == {TOKENIZER.eos_token_id, *expected}


def test_end_of_sequence_of_a_tokenizer_without_a_folder():
    assert stop_token_ids(make_tokenizer()) == {TOKENIZER.eos_token_id}


def test_the_models_folder_names_what_a_tokenizer_from_elsewhere_does_not_know(tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    assert stop_token_ids(make_tokenizer(), str(tmp_path)) == {TOKENIZER.eos_token_id, 3, 4}
    assert stop_token_ids(make_tokenizer(), "/not/on/this/machine") == {TOKENIZER.eos_token_id}


def test_a_rendered_template_has_one_bos():
    """Whether it writes its BOS itself or leaves that to the tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    plain = tokenizer("what is", add_special_tokens=False)["input_ids"]
    for text in ("<s>what is", "what is"):
        assert encode_prompt(text, tokenizer, parse_special_tokens=True) == [bos, *plain]
    twice = encode_prompt("<s>what is", tokenizer)
    assert twice[0] == bos and bos not in twice[1:], "without parsing, the text's is a plain string"


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(str(tmp_path), local_files_only=True)
