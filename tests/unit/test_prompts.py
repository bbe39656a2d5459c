"""One form of prompts for training and production, and what π_t sees of a row."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
import transformers
from datasets import Dataset
from packaging.version import Version

from dual_rollout.production.rows import Columns, open_source
from dual_rollout.prompts import check_prompt_is_text, target_prompt, without_nulls
from dual_rollout.text import encode_prompt
from dual_rollout.training.contexts import with_t_prompts
from tests.tiny_model import make_tokenizer

SECRET = [{"role": "user", "content": "the user"}]
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": "1"}}}
OTHER_CALL = {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}}
TURNS = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "w", "name": "ann"},
    {"role": "assistant", "tool_calls": [CALL, OTHER_CALL]},
    {"role": "tool", "content": "7"},
]
PRINTS = (
    "{% for m in messages %}{{ m['role'] }}{% if 'name' in m %} ({{ m['name'] }}){% endif %}: {{ m['content'] }}"
    "{% for c in m.get('tool_calls', []) %}{{ c | tojson }}{% endfor %}{{ '\\n' }}{% endfor %}"
)
ASKS_FOR_NULL = (  # as DeepSeek's does
    "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is none %}{{ m['tool_calls'] | tojson }}"
    "{% else %}{{ m['content'] + '.' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def tokenizer_with(template: str) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def rendered(prompt: Any, template: str) -> str:
    tokenizer = tokenizer_with(template)
    return tokenizer.decode(encode_prompt(prompt, tokenizer))


def of_arrow(prompt: Any) -> Any:
    (row,) = Dataset.from_list([{"prompt": prompt}])
    return row["prompt"]


def test_nulls_that_arrow_adds_reach_no_template():
    stored = of_arrow(TURNS)
    assert json.dumps(stored).count("null") >= 8, "the test needs some, also inside of tool calls"
    expected = (
        f"system: s\nuser (ann): w\nassistant: {json.dumps(CALL)}{json.dumps(OTHER_CALL)}\ntool: 7\n"  # no "None"
    )
    assert rendered(TURNS, PRINTS) == rendered(stored, PRINTS) == expected
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", "mark": 1}]
    template = "{% for m in messages %}{% for p in m['content'] %}{{ p | tojson }}{% endfor %}{% endfor %}"
    prompt = [{"role": "user", "content": parts}]
    assert rendered(of_arrow(prompt), template) == rendered(prompt, template) == "".join(map(json.dumps, parts))


@pytest.mark.xfail(
    Version(transformers.__version__) >= Version("5.24.0.dev0"),
    reason="transformers takes null keys out of messages before the template sees them",
    strict=True,
)
def test_a_template_may_ask_whether_a_call_has_content():
    expected = f"user: w.\nassistant: {json.dumps([CALL, OTHER_CALL])}\ntool: 7.\n"
    for prompt in (TURNS[1:], of_arrow(TURNS[1:])):
        assert rendered(prompt, ASKS_FOR_NULL) == expected


def test_parts_that_are_strings_are_text():
    template = "{% for m in messages %}{% for p in m['content'] %}[{{ p['text'] }}]{% endfor %}{% endfor %}"
    assert rendered([{"role": "user", "content": ["a", {"type": "text", "text": "b"}]}], template) == "[a][b]"


def test_prompts_of_other_forms_are_left_alone():
    for prompt in ("text", [1, 2], [], None, 5, [["a"]]):
        assert without_nulls(prompt) == prompt
    assert without_nulls([{"role": "user", "content": None, "name": None}, "odd"]) == [
        {"role": "user", "content": None},
        "odd",
    ]


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_media_are_refused_wherever_a_prompt_is_taken(kind):
    prompt = [{"role": "user", "content": [{"type": kind}, {"type": "text", "text": "what"}]}]
    for take in (check_prompt_is_text, lambda prompt: encode_prompt(prompt, make_tokenizer())):
        with pytest.raises(ValueError, match=f"message 0 .*{kind}.* text alone"):
            take(prompt)


def test_templates() -> None:
    chat = {"prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}], "answer": "4"}
    system = {"role": "system", "content": "The answer is 4."}
    assert target_prompt(chat, system_prompt="The answer is {answer}.") == [system, chat["prompt"][1]]
    assert target_prompt({**chat, "prompt": chat["prompt"][1:]}, system_prompt="The answer is {answer}.") == [
        system,
        chat["prompt"][1],
    ]
    both = target_prompt(chat, template="2+2? ({answer})", system_prompt="The answer is {answer}.")
    assert both == [system, {"role": "user", "content": "2+2? (4)"}]
    assert target_prompt({"prompt": "2+2?", "answer": "4"}, template="2+2={answer}") == "2+2=4"
    assert target_prompt({**chat, "t_prompt": SECRET}) == SECRET
    with pytest.raises(ValueError, match=r"t_system_prompt .*'key' is none of the dataset's columns prompt, answer"):
        target_prompt(chat, system_prompt="{key}")
    with pytest.raises(ValueError, match="chat messages"):
        target_prompt({"prompt": "2+2?"}, system_prompt="no")
    nested = {"prompt": "2+2?", "reward_model": {"truth": "4"}}
    assert target_prompt(nested, template="{reward_model[truth]} in {{braces}}") == "4 in {braces}"
    for template, named in (
        ("{answer", "expected '}'"),
        (r"\boxed{}", "'' is none of the dataset's columns"),
        ("{reward_model[lie]}", "lie"),
        ("{empty}", "'empty' is null in a row"),
        ("{empty:03d}", "'empty:03d' in braces is no column"),
    ):
        with pytest.raises(ValueError, match=f"t_prompt_template .*{named}.*write {{{{ and }}}} for braces"):
            target_prompt({**nested, "empty": None}, template=template)
    dataset = Dataset.from_list([chat])
    assert with_t_prompts(dataset) is dataset
    assert with_t_prompts(dataset, system_prompt="{answer}")[0]["t_prompt"][0]["content"] == "4"


@pytest.mark.parametrize("prompt", [[], "", None])
def test_an_empty_prompt_has_no_turn_to_replace(prompt):
    for turns in ({"system_prompt": "s"}, {"template": "t"}):
        with pytest.raises(ValueError, match="the prompt is empty"):
            target_prompt({"prompt": prompt}, **turns)
    with pytest.raises(ValueError, match="the prompt is empty"):
        with_t_prompts(Dataset.from_list([{"prompt": []}]), system_prompt="s")


def test_token_ids_have_no_turns():
    with pytest.raises(ValueError, match="text or chat messages, not of token ids"):
        target_prompt({"prompt": [1, 2]}, template="t")


def test_turns_for_the_target_have_the_form_of_the_others():
    """A prompt of parts stays one: templates take either, and Arrow one type per column."""
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]
    shown = target_prompt({"prompt": parts, "answer": "4"}, template="It is {answer}", system_prompt="s")
    assert [turn["content"] for turn in shown] == [
        [{"type": "text", "text": "s"}],
        [{"type": "text", "text": "It is 4"}],
    ]
    Dataset.from_list([{"prompt": parts, "t_prompt": shown}])


@pytest.mark.parametrize(
    "turns", [{"template": "{prompt}?"}, {"template": "{info[truth]}!"}, {"system_prompt": "It is {answer}."}]
)
def test_training_and_production_show_the_target_the_same(tmp_path, turns):
    rows = [
        {"prompt": TURNS, "answer": "4", "info": {"truth": "a"}},
        {"prompt": TURNS[:2], "answer": "5", "info": {"truth": "b"}},
    ]
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows))
    Dataset.from_list(rows).to_parquet(tmp_path / "in.parquet")
    columns = Columns(t_prompt_template=turns.get("template"), t_system_prompt=turns.get("system_prompt"))
    seen = [
        [columns.t_prompt_of(row) for row in open_source([str(path)], columns)],
        [columns.t_prompt_of(row) for row in open_source([str(tmp_path / "in.parquet")], columns)],
        with_t_prompts(Dataset.from_list(rows), **turns)["t_prompt"],
    ]
    if "prompt" in str(turns.get("template")):  # shows the messages themselves, with their nulls where they have some
        seen = [[prompt[:-1] for prompt in prompts] for prompts in seen]
    first, *others = [[rendered(prompt, PRINTS) for prompt in prompts] for prompts in seen]
    assert all(other == first for other in others)


def test_a_row_without_what_a_template_needs_says_so():
    columns = Columns(t_prompt_template="{answer}")
    row = {"prompt": "2+2?", "answer": None}
    assert columns.t_prompt_of(row) == "" and "'answer' is null in a row" in str(columns.t_prompt_error(row))
    assert columns.t_prompt_error({**row, "answer": "4"}) is None
