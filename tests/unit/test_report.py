"""`dual-rollout report`: what the page holds, and, in a real browser, what it shows of it."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dual_rollout.cli import main
from dual_rollout.report.token_texts import PART_OF_A_CHARACTER, TokenTexts
from dual_rollout.training.kept_rollouts import KeptRollouts
from tests.browser import CHROMIUM, NOT_THERE, browser
from tests.report_page import read_page
from tests.tiny_model import make_tokenizer

HOSTILE = "</script><script>document.title = 'taken'</script><img src=http://127.0.0.1:9/x>"
TEXTS = ["the user is in\nthat", "é and 🙂 of", f"to {HOSTILE}", "what"]
REWARDS = [0.25, 1.0, 0.0, 0.5]
DRAFTS = [(8, 6), (4, 1), (0, 0), (None, None)]  # drafted and accepted tokens
RESULT = slice(2, 5)  # tokens of the first rollout that a tool gave
NUMBERS = ("alpha_history", "logprobs_q", "logprobs_theta", "logprobs_t", "kl_theta", "coverage_theta", "coverage_t")
STEPS = [
    {"step": 1, "reward": 0.3, "sampling/alpha/mean": 0.5, "sampling/pareto_k": 0.2, "rollout/seconds": 2.0},
    {"step": 2, "reward": 0.6, "sampling/alpha/mean": 0.4, "sampling/pareto_k": math.nan, "rollout/seconds": 1.0},
    {"step": 2, "eval_loss": 0.0, "eval_reward": 0.4, "eval_hard_reward": 0.1},
]


def rows() -> list[dict[str, Any]]:
    rng, tokenizer, made = np.random.default_rng(0), make_tokenizer(), []
    for number, (text, reward) in enumerate(zip(TEXTS, REWARDS, strict=True)):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        numbers = {name: -rng.exponential(1.0, len(ids)) for name in NUMBERS}
        for name in ("alpha_history", "coverage_theta", "coverage_t"):
            numbers[name] = rng.random(len(ids))
        for values in numbers.values() if number == 0 else ():
            values[RESULT] = math.nan
        weights = np.exp(numbers["logprobs_theta"] - numbers["logprobs_q"])
        about = {"prompt": [{"role": "user", "content": f"q {number}"}], "t_prompt": HOSTILE if number == 1 else None}
        about |= {"t_target": None, "reward": reward, "advantage": -0.5, "generated_tokens": ids}
        about |= dict(zip(("draft_tokens", "accepted_tokens"), DRAFTS[number], strict=True))
        made.append(
            about | {name: v.tolist() for name, v in numbers.items()} | {"importance_weights": weights.tolist()}
        )
    return made


ROWS = rows()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of two rollouts each, of three that there were."""
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    kept, state = KeptRollouts(2), SimpleNamespace(is_world_process_zero=True, global_step=0)
    kept.on_train_begin(SimpleNamespace(output_dir=str(folder)), state, None)
    for step, own in ((1, ROWS[:2]), (2, ROWS[2:])):
        assert kept.wants(step)
        kept.keep(step, [*own, ROWS[0]], str(folder / "tokenizer"))
        assert not kept.wants(step)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in STEPS) + '{"step": 3, "rew')
    return folder


@pytest.fixture(scope="module")
def page_path(run: Path) -> Path:
    path = run / "report.html"
    assert main(["report", str(run), "-o", str(path)]) == 0
    return path


def test_the_page_holds_the_numbers_and_texts_of_the_run(page_path: Path) -> None:
    page = read_page(page_path)
    assert page.ids == [row["generated_tokens"] for row in ROWS]
    assert [rollout["reward"] for rollout in page.data["rollouts"]] == REWARDS
    assert [rollout["step"] for rollout in page.data["rollouts"]] == [1, 1, 2, 2]
    for name, column in zip(("alpha", *NUMBERS[1:5]), NUMBERS, strict=False):
        for found, row in zip(page.numbers[name], ROWS, strict=True):
            np.testing.assert_array_equal(found, np.float32(row[column]))
    for found, row in zip(page.numbers["coverage"], ROWS, strict=True):
        np.testing.assert_array_equal(found, np.minimum(*(np.float32(row[column]) for column in NUMBERS[5:])))
    for texts, text in zip(page.texts, TEXTS, strict=True):
        assert "".join(texts).replace(PART_OF_A_CHARACTER, "") == f"{text}<|im_end|>"
    assert page.data["prompts"][page.data["rollouts"][3]["prompt"]] == "user: q 3"
    known = [{k: v for k, v in entry.items() if v == v} for entry in STEPS]
    assert page.data["steps"] == known, "without NaN, and without the line that was cut off"


def test_the_page_fetches_nothing_and_runs_no_text(page_path: Path) -> None:
    html = read_page(page_path).html
    assert html.count("<script") == 3, "none of a prompt or of a completion"
    addresses = re.findall(r"""\b(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]*)""", html)
    assert set(addresses) == {"data:,", "http://127.0.0.1:9/x\\u003e"}, "the latter in a text, escaped"
    assert "<img" not in html and "default-src 'none'" in html


def test_more_rollouts_than_asked_for_are_shown_at_equal_distances(run: Path, tmp_path: Path) -> None:
    assert main(["report", str(run), "-o", str(tmp_path / "a.html"), "--max-rollouts", "2"]) == 0
    page = read_page(tmp_path / "a.html")
    assert (page.data["found"], page.ids) == (4, [ROWS[i]["generated_tokens"] for i in (0, 3)])


def test_a_new_run_begins_anew_and_a_resumed_one_goes_on(run: Path, tmp_path: Path) -> None:
    kept, args = KeptRollouts(1), SimpleNamespace(output_dir=str(tmp_path))

    def steps_after(global_step: int) -> list[str]:
        kept.on_train_begin(args, SimpleNamespace(is_world_process_zero=True, global_step=global_step), None)
        return sorted(path.name for path in (tmp_path / "rollouts").glob("*"))

    assert steps_after(0) == []
    for step in (1, 2, 3):
        kept.keep(step, ROWS, "nowhere")
    assert steps_after(2) == ["rollouts_00001.parquet", "rollouts_00002.parquet"]
    assert steps_after(0) == []
    assert not KeptRollouts(0).wants(1)


@pytest.mark.parametrize(
    ("make", "flags", "words"),
    [
        (lambda folder: folder / "nowhere", [], ("does not exist", "output_dir")),
        (lambda folder: folder, [], ("neither a training run", "train-*.parquet")),
        (lambda folder: _file(folder / "shard.csv", ""), [], ("is no shard", ".jsonl")),
        (lambda folder: _file(folder / "train-0.parquet", "PAR1"), [], ("train-0.parquet is no readable Parquet",)),
        (lambda folder: _file(folder / "train-0.jsonl", "{"), [], ("train-0.jsonl, line 1 is no JSON",)),
        (lambda folder: _file(folder / "train-0.jsonl", "{}\n"), [], ("no column generated_tokens", "alpha_history")),
        (lambda folder: _file(folder / "train-0.jsonl", _row(3, 2)), [], ("3 tokens, but 2 values of alpha_history",)),
        (lambda folder: _file(folder / "train-0.jsonl", ""), [], ("no rollouts in it yet",)),
        (lambda folder: _file(folder / "train-0.jsonl", _row(1, 1)), [], ("tokenizer", "set --tokenizer")),
        (lambda folder: _file(folder / "train-0.jsonl", _row(1, 1)), ["--max-rollouts", "0"], ("--max-rollouts",)),
    ],
)
def test_what_cannot_be_shown_is_said(
    make: Any, flags: list[str], words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)
    assert main(["report", str(path), "-o", str(tmp_path / "a.html"), *flags]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in words), said
    assert not (tmp_path / "a.html").exists()


def _file(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def _row(tokens: int, numbers: int) -> str:
    columns = {name: [0.5] * numbers for name in ("alpha_history", "logprobs_q", "logprobs_theta", "logprobs_t")}
    return json.dumps({"generated_tokens": [1] * tokens, **columns}) + "\n"


def test_the_texts_of_tokens_are_the_text_of_the_whole() -> None:
    tokenizer = make_tokenizer()
    texts = TokenTexts(tokenizer)
    for text in ("naïve 🙂🙂 the user", " a  b\n", "日本語"):
        ids = tokenizer(text)["input_ids"]
        pieces = [texts.texts[number] for number in texts.of(ids)]
        assert "".join(pieces).replace(PART_OF_A_CHARACTER, "") == text and len(pieces) == len(ids)
    broken = tokenizer("🙂")["input_ids"][:2]
    assert [texts.texts[number] for number in texts.of(broken)] == [PART_OF_A_CHARACTER] * 2
    assert [texts.texts[number] for number in texts.of([99999])] == ["⟨99999⟩"], "of a padded vocabulary"
    with pytest.raises(ValueError, match="--tokenizer"):
        texts.of([2**40])


def test_a_kept_file_has_what_the_report_needs(run: Path) -> None:
    table = pq.read_table(run / "rollouts/rollouts_00001.parquet")
    assert table.num_rows == 2
    assert np.isnan(table["alpha_history"][0].as_py()).nonzero()[0].tolist() == list(range(*RESULT.indices(9)))


# ---- in a browser ----------------------------------------------------------------------------------------------------

in_a_browser = pytest.mark.skipif(CHROMIUM is None, reason=NOT_THERE)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(chromium: Any, page_path: Path) -> Iterator[Any]:
    """The opened page; it must ask for nothing but itself, and log no error."""
    context = chromium.new_context(viewport={"width": 1200, "height": 900}, color_scheme="light")
    opened, asked, errors = context.new_page(), [], []
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    opened.goto(page_path.as_uri())
    yield opened
    assert asked == [page_path.as_uri()] and errors == []
    context.close()


def listed(page: Any) -> list[str]:
    """The rewards of the rows, in their order."""
    return page.locator(".row > :nth-child(2)").all_inner_texts()


@in_a_browser
def test_a_browser_shows_the_texts_and_numbers_of_the_run(page: Any) -> None:
    assert page.locator(".row").count() == 4
    for number, (row, text) in enumerate(zip(ROWS, TEXTS, strict=True)):
        page.locator(f"#row-{number}").click()
        spans = page.locator("#rollout span[data-i]")
        shown = "".join(spans.all_text_contents()).replace(PART_OF_A_CHARACTER, "")
        assert shown == f"{text}<|im_end|>" and spans.count() == len(row["generated_tokens"])
        assert page.locator("#rollout .prompt.prompt").first.text_content() == f"user: q {number}"
        spans.last.hover()
        cells = dict(zip(*(page.locator(f"#token {tag}").all_text_contents() for tag in ("th", "td")), strict=True))
        expected = {
            "π_θ(y)": math.exp(row["logprobs_theta"][-1]),
            "π_t(y)": math.exp(row["logprobs_t"][-1]),
            "q*(y)": math.exp(row["logprobs_q"][-1]),
            "α": row["alpha_history"][-1],
            "weight π_θ/q*": row["importance_weights"][-1],
            "KL(q*‖π_θ)": row["kl_theta"][-1],
        }
        for name, value in expected.items():
            assert float(cells[name]) == pytest.approx(value, rel=1e-3), name
        assert f"token {row['generated_tokens'][-1]}," in page.locator("#token").text_content()
    assert page.title() != "taken"


@in_a_browser
def test_tool_results_stand_apart_and_have_no_numbers(page: Any) -> None:
    page.locator("#row-0").click()
    assert page.locator(".turn").count() == 3 and page.locator(".turn.tool").count() == 1
    assert page.locator(".turn.tool span").count() == RESULT.stop - RESULT.start
    assert page.locator("#rollout h2", has_text="turn").all_inner_texts() == ["turn 1", "turn 2"]
    page.locator(".turn.tool span").first.hover()
    assert "not drawn" in page.locator("#token").inner_text()
    assert page.locator(".turn.tool span").first.get_attribute("style") in (None, "")


@in_a_browser
def test_rollouts_are_sorted_and_filtered(page: Any) -> None:
    assert listed(page) == ["0.250", "1", "0", "0.500"]
    page.select_option("#sort", "reward")
    assert listed(page) == ["0", "0.250", "0.500", "1"]
    page.check("#descending")
    assert listed(page) == ["1", "0.500", "0.250", "0"]
    page.fill("#from-reward", "0.3")
    assert listed(page) == ["1", "0.500"] and "2 of 4 rollouts" in page.inner_text("#counts")
    page.fill("#to-length", "3")
    assert listed(page) == ["0.500"]
    page.fill("#from-alpha", "1.5")
    assert listed(page) == [] and "no rollout" in page.inner_text("#rollout")
    page.click("#reset")
    assert len(listed(page)) == 4


@in_a_browser
def test_the_keyboard_does_all_of_it(page: Any) -> None:
    page.keyboard.press("j")
    assert page.locator(".row[aria-selected=true]").get_attribute("id") == "row-1"
    page.keyboard.press("k")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    second = page.locator("#rollout span[data-i]").nth(1)
    assert second.evaluate("span => span === document.activeElement")
    assert page.locator("#token").is_visible(), "what hovering shows, for the token in focus"
    before = second.get_attribute("style")
    for key, name in (("2", "weight"), ("3", "KL"), ("4", "log-ratio"), ("1", "α")):
        page.keyboard.press(key)
        assert page.locator(f"#colour-{name}").is_checked() and name in page.inner_text("#legend")
        assert (second.get_attribute("style") == before) == (key == "1")
    page.keyboard.press("t")
    assert page.locator("html").get_attribute("data-theme") == "dark"


@in_a_browser
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("vision", ["none", "protanopia", "deuteranopia", "tritanopia"])
def test_both_ends_of_the_colours_are_told_apart(page: Any, theme: str, vision: str) -> None:
    """As the browser simulates each kind of colour vision: the ends of the legend's bar, and its middle."""
    if page.locator("html").get_attribute("data-theme") != theme:
        page.keyboard.press("t")
    page.context.new_cdp_session(page).send("Emulation.setEmulatedVisionDeficiency", {"type": vision})
    pixels = np.asarray(Image.open(io.BytesIO(page.locator("#legend i").screenshot())).convert("RGB"), dtype=float)
    row = pixels[len(pixels) // 2]
    low, middle, high = row[3], row[len(row) // 2], row[-4]
    for one, other in ((low, high), (low, middle), (middle, high)):
        assert np.abs(one - other).max() > 80, "of 255; red and green come to 18"


@in_a_browser
def test_plots_are_of_the_steps_and_of_the_rollouts_that_are_listed(page: Any) -> None:
    """In words, which a screen reader says, and as what stands under the mouse."""

    def said(title: str) -> str:
        return page.locator("figure:visible", has_text=title).locator("[role=img]").get_attribute("aria-label")

    def under_the_mouse(title: str, x: float) -> list[str]:
        canvas = page.locator("figure", has_text=title).locator(".u-over")
        size = canvas.bounding_box()
        canvas.hover(position={"x": x * (size["width"] - 1), "y": 20})
        return page.locator("figure", has_text=title).locator(".u-value").all_inner_texts()

    titles = page.locator("figcaption").all_inner_texts()
    for title in ("α of the tokens", "log weight", "coverage of the shorter", "reward", "k̂ of the weights", "seconds"):
        assert any(found.startswith(title) for found in titles), title
    assert said("policy alone") == (
        "reward: q* from 0.300 to 0.600, between 0.300 and 0.600; "
        "policy alone, hard from 0.100 to 0.100, between 0.100 and 0.100; "
        "policy alone from 0.400 to 0.400, between 0.400 and 0.400; steps 1 to 2"
    )
    assert under_the_mouse("policy alone", 0) == ["1", "0.300", "–", "–"]
    assert under_the_mouse("policy alone", 1) == ["2", "0.600", "0.100", "0.400"]

    drawn = [sum(not math.isnan(value) for value in row["alpha_history"]) for row in ROWS]
    assert said("α of the tokens").startswith(f"α of the tokens listed: {sum(drawn)} tokens, most of them")
    assert "2 rollouts, most of them (1) from 0.233 to 0.267" in said("drafts accepted"), "of those with drafts"
    assert under_the_mouse("drafts accepted", 0.76) == ["0.733 to 0.767", "1"]
    assert under_the_mouse("drafts accepted", 0.51) == ["0.500 to 0.533", "0"]
    page.fill("#from-reward", "1")
    assert f" {drawn[1]} tokens, " in said("α of the tokens") and " 1 rollouts, " in said("drafts accepted")
    page.fill("#from-reward", "0.5")
    page.fill("#to-reward", "0.5")
    shown = page.locator("figure:visible figcaption").all_inner_texts()
    assert not any("drafts accepted" in title for title in shown), "where nothing was drafted"
    assert any("α of the tokens" in title for title in shown)


@in_a_browser
def test_plots_change_with_the_theme_and_have_lines_that_differ_without_colour(page: Any) -> None:
    reward = page.locator("figure", has_text="policy alone")
    markers = reward.locator(".u-marker").evaluate_all("all => all.map(m => getComputedStyle(m).borderTopStyle)")
    assert markers[1:] == ["solid", "dashed", "dotted"]

    def colours(title: str) -> set[tuple[int, ...]]:
        picture = page.locator("figure", has_text=title).locator("canvas").screenshot()
        pixels = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB")).reshape(-1, 3)
        return set(map(tuple, pixels.tolist()))

    blue, other = {"light": (0, 114, 178), "dark": (86, 180, 233)}, {"light": "dark", "dark": "light"}
    for theme in ("light", "dark"):
        for title in ("policy alone", "α of the tokens"):  # a line, and bars
            assert blue[theme] in colours(title) and blue[other[theme]] not in colours(title), (theme, title)
        page.keyboard.press("t")
