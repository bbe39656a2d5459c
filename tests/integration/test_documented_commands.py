"""The clients' commands of README and docs, run as they stand there: only the servers' addresses are this machine's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dual_rollout.cli import main
from tests.documents import PAGES, ROOT, arguments_of
from tests.warm_servers import WarmServer

RUN = ("doctor", "generate", "report")
RUN_ELSEWHERE = {
    "serve": "until it is stopped: test_server.py",
    "serve-native": "needs vLLM: tests/vllm",
    "bench": "needs five servers: test_bench.py",
    "train": "a recipe: test_recipes.py, tests/vllm, and `make demo`",
}
QUESTIONS = [{"prompt": "what is that", "answer": "7"}, {"prompt": "and to the", "answer": "8"}]
NOT_HERE = ("$INPUT", "native")  # of the shell's variables, and of native servers (tests/vllm)


@pytest.fixture(scope="module")
def urls(tiny_models: tuple[Path, Path]) -> Iterator[dict[str, str]]:
    """Servers with room for what the commands ask for, by the addresses that the documents have."""
    flags = ["--max-logprobs", "-1", "--max-model-len", "512", "--threads", "1"]
    with WarmServer(tiny_models[0], flags) as theta, WarmServer(tiny_models[1], flags) as t:
        yield {"http://127.0.0.1:8000": theta.url, "http://127.0.0.1:8001": t.url}


def found(*pages: str) -> list[list[str]]:
    chosen = [page for page in PAGES if page.relative_to(ROOT).as_posix() in pages]
    return [words for page in chosen for words in arguments_of("dual-rollout", page)]


def test_each_command_is_run_here_or_elsewhere() -> None:
    names = {words[0] for page in PAGES for words in arguments_of("dual-rollout", page)}
    assert names == {*RUN, *RUN_ELSEWHERE}


@pytest.mark.parametrize(
    ("pages", "number"), [(("README.md", "docs/report.md"), 4), (("docs/generate.md",), 3)], ids=str
)
def test_the_commands_run(
    pages: tuple[str, ...], number: int, urls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they stand there, so that one finds what another has written."""
    monkeypatch.chdir(tmp_path)
    run = Path("outputs/grpo_cpu")  # that `train` would have left
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    for name in ("prompts.jsonl", "questions.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    statuses = {}
    for words in found(*pages):
        if words[0] in RUN and not any(word in words for word in NOT_HERE):
            argv = [urls.get(word, word) for word in words]
            statuses[" ".join(words)] = main(argv)  # argparse raises where it does not know a flag
    assert len(statuses) == number and not any(statuses.values()), statuses
