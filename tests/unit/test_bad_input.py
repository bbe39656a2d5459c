"""Prompts, settings and commands that nobody should send: each is refused in words, or read as plain text."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from dual_rollout import CoordinatorConfig
from dual_rollout.cli import main
from dual_rollout.exceptions import EngineError
from dual_rollout.exit_status import DEBUG_VARIABLE, exit_status
from dual_rollout.production.rows import Columns, open_source
from dual_rollout.production.shard_columns import output_schema
from dual_rollout.production.shards import Journal, _write_parquet
from dual_rollout.text import encode_prompt, names_special_token
from dual_rollout.training.arguments import DualArguments
from dual_rollout.training.recipe_validation import check_recipe_file
from dual_rollout.yaml_file import read_mapping
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


# ---- files ----------------------------------------------------------------------------------------------------------

YAML_PIECES = (
    "a: ", "- ", "[", "]", "{", "}", "!!int ", "!!bool ", "!!timestamp ", "!!float ", "2024-99-99", "maybe", "'", "&x ",
    "*x ", "\n", "  ", '"\\ud800"', "9" * 400, "9" * 5000, "? ", "| ", "0x", ".inf", "1:99", "~", "\0", "[" * 3000,
)  # fmt: skip


@given(st.lists(st.sampled_from(YAML_PIECES), max_size=8).map("".join).map(str.encode) | st.binary(max_size=30))
def test_any_file_is_a_mapping_or_a_value_error_with_its_name(yaml_path, content):
    yaml_path.write_bytes(content)
    mistake, values = None, None
    try:
        values = read_mapping(str(yaml_path), "the recipe")
    except ValueError as error:
        mistake = str(error)
    assert isinstance(values, dict) if mistake is None else str(yaml_path) in mistake


@pytest.fixture(scope="module")
def yaml_path(tmp_path_factory):
    return tmp_path_factory.mktemp("yaml") / "any.yaml"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("seed: !!bool maybe", "maybe"),
        ("seed: !!int ''", "not what its form says"),
        ("seed: !!timestamp foo", "not what its form says"),
        ("seed: 2024-99-99", "month must be in 1..12"),
        ("seed: " + "[" * 5000, "nested too deeply"),
        ("seed: " + "9" * 5000, "4300 digits"),
        ('tokenizer: "\\ud800"', "surrogates"),
        ("temperature: " + "9" * 400, "temperature must be a"),
        ("- a", "must be a mapping"),
    ],
)
def test_a_config_and_a_recipe_are_refused_alike(yaml_path, content, message, capsys):
    yaml_path.write_text(content)
    assert main(["generate", "--config", str(yaml_path), "--input", "no.jsonl", "--output", "no"]) == 2
    error = capsys.readouterr().err
    assert str(yaml_path) in error and message in error
    yaml_path.write_text(content.replace("temperature", "dual_temperature"))
    with pytest.raises(ValueError, match=re.escape(str(yaml_path))) as raised:
        check_recipe_file(str(yaml_path), [DualArguments])
    assert message in str(raised.value)


# ---- rows of an input -----------------------------------------------------------------------------------------------

TEXT = st.text(st.sampled_from("ab é🙂<|im_end|>{}"), max_size=8)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.sampled_from([0, 2**53 + 1]) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=6,
)
PROMPTS = TEXT | st.lists(st.integers(0, 99), max_size=3) | messages(TEXT) | VALUES
COLUMNS = (Columns(keep=("kept",)), Columns(t_prompt="kept"), Columns(t_prompt_template="{prompt} {kept}"))


@given(
    st.lists(st.fixed_dictionaries({"prompt": PROMPTS, "kept": VALUES}), max_size=4),
    st.sampled_from(COLUMNS),
    st.sampled_from(["jsonl", "parquet"]),
    st.sampled_from([1, 1000]),
)
def test_any_rows_can_be_written_or_are_a_value_error(rows_folder, rows, columns, kind, batch):
    path = rows_folder / f"in.{kind}"
    if kind == "jsonl":
        path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    else:
        try:
            pq.write_table(pa.Table.from_pylist(rows), path)
        except (pa.ArrowException, OverflowError):
            return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dual_rollout.production.rows._BATCH", batch)  # types are found part by part
        try:
            source = open_source([str(path)], columns)
            schema = output_schema(source.schema, columns)
        except ValueError:
            return
        found = list(source)
    assert len(found) == len(rows)
    written = []
    for row in found:
        prompt, t_prompt = columns.prompt_of(row), columns.t_prompt_of(row)
        for seen in (prompt, t_prompt):
            with contextlib.suppress(ValueError):
                encode_prompt(seen, TOKENIZER)
        shown = {"t_prompt": t_prompt} if columns.shows_t_prompt else {}
        written.append({"prompt": prompt, "error": None, **shown, **{name: row[name] for name in columns.keep}})
    journal = Journal(rows_folder / "journal")
    for number, row in enumerate(written):
        journal.add(number, row)
    with open(rows_folder / "out.parquet", "wb") as file:
        _write_parquet(file, (row for _, row in journal.items()), schema)
    journal.path.unlink()
    stored = pq.read_table(rows_folder / "out.parquet").to_pylist()
    assert [row["prompt"] is None for row in stored] == [row["prompt"] is None for row in written]
    if columns.keep:
        assert json.dumps([row["kept"] for row in stored]).count("9007199254740993") == json.dumps(
            [row["kept"] for row in written]
        ).count("9007199254740993"), "an integer that no float holds was rounded"


@pytest.fixture(scope="module")
def rows_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([], {}, "has no rows"),
        ([{"prompt": 5}], {}, "column prompt is of type int64; prompts are text"),
        ([{"prompt": 5}], {"t_prompt_template": "{prompt}"}, "prompts are text"),
        ([{"prompt": {"role": "user"}}], {}, "prompts are text"),
        ([{"prompt": "a", "x": {}}], {"keep": ("x",)}, "neither mappings of nothing"),
        ([{"prompt": "a", "x": [{}]}], {"keep": ("x",)}, "neither mappings of nothing"),
        ([{"prompt": "a", "x": json.loads("[" * 60 + "]" * 60)}], {"keep": ("x",)}, "nor deep nesting"),
        ([{"prompt": "a", "x": 0.5}] * 1000 + [{"prompt": "a", "x": 2**53 + 1}], {"keep": ("x",)}, "9007199254740993"),
        ([{"prompt": "a", "x": 2**53 + 1}] * 1000 + [{"prompt": "a", "x": 0.5}], {"keep": ("x",)}, "9007199254740993"),
        ([{"prompt": "a"}], {"t_prompt_template": "{prompt!x}"}, "is no column"),
    ],
)
def test_rows_that_are_refused_in_words(rows_folder, rows, columns, message):
    path = rows_folder / "in.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    with pytest.raises(ValueError, match=message):
        output_schema(open_source([str(path)], Columns(**columns)).schema, Columns(**columns))


def test_parquet_files_and_datasets_that_are_damaged_are_named(rows_folder, tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, names=["prompt", "prompt"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(ValueError, match=r"twice.parquet has 2 columns 'prompt'"):
        open_source([str(tmp_path / "twice.parquet")], Columns())
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"prompt": [f"{n} is" for n in range(5000)]}), path)
    content = bytearray(path.read_bytes())
    content[500:900] = bytes(400)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bad.parquet: "):
        list(open_source([str(path)], Columns()))
    (tmp_path / "data").mkdir()
    for text in ('{"prompt": "a"}\n' * 20_000 + "{", ""):
        (tmp_path / "data/train.jsonl").write_text(text)
        with pytest.raises(ValueError, match=r"data"):
            list(open_source([str(tmp_path / "data")], Columns()))


@pytest.mark.parametrize("flag", ["--limit", "--max-tokens", "--num-generations", "--rows-per-shard"])
def test_numbers_out_of_range(flag, rows_folder, capsys):
    for value in ("0", "-1", str(10**30)):
        assert main(["generate", "--input", "no.jsonl", "--output", "no", flag, value]) == 2
        assert f"{flag} must be at least 1 and at most 2147483647, got {value}" in capsys.readouterr().err


def test_arguments_that_are_no_text(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["generate", "--t-prompt-template", "{prompt} \udcff"])
    assert ended.value.code == 2 and "not valid Unicode" in capsys.readouterr().err


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
