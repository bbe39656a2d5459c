"""`dual-rollout serve-native`: the command it makes, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import PreTrainedTokenizerFast

from dual_rollout.cli import main
from dual_rollout.config import AlphaRule
from dual_rollout.native import ARCHITECTURE
from dual_rollout.native.refusals import refuse_config
from tests.tiny_model import make_tiny_model, make_tokenizer


@pytest.fixture(scope="module")
def theta(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("native") / "theta")


@pytest.fixture(scope="module")
def t(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("native") / "t", num_layers=3, seed=1)


def printed_command(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert main(["serve-native", *arguments, "--dry-run"]) == 0
    return shlex.split(capsys.readouterr().out)


def test_dry_run_prints_vllms_command(theta: Path, t: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = printed_command(capsys, str(theta), str(t), "--port", "8123", "--enforce-eager")
    assert command[command.index("--model") + 1] == str(theta)
    assert command[-3:] == ["--port", "8123", "--enforce-eager"]
    overrides = json.loads(command[command.index("--hf-overrides") + 1])
    vocab_size = json.loads((t / "config.json").read_text())["vocab_size"]
    settings = {"t": str(t), "architectures": ["LlamaForCausalLM"], "vocab_size_t": vocab_size}
    assert overrides == {"architectures": [ARCHITECTURE], "dual_rollout": {**settings, "ordinary_requests": None}}
    assert "--logits-processors" in command and "--logprobs-mode" not in command


def test_ordinary_requests_may_be_drawn_from_q_star(theta: Path, t: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ordinary-requests", "q_star", "--alpha-method", "kl_budget", "--kl-budget", "0.1"]
    command = printed_command(capsys, str(theta), str(t), *flags)
    rule = json.loads(command[command.index("--hf-overrides") + 1])["dual_rollout"]["ordinary_requests"]
    assert AlphaRule(**rule) == AlphaRule(alpha_method="kl_budget", kl_budget=0.1)
    assert command[command.index("--logprobs-mode") + 1] == "processed_logprobs"


def test_relative_folders_are_made_absolute(
    theta: Path, t: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(theta.parent)
    command = printed_command(capsys, theta.name, str(t))
    assert command[command.index("--model") + 1] == str(theta)


def test_vllms_own_flags_win(theta: Path, t: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ordinary-requests", "q_star", "--logprobs-mode", "raw_logprobs"]
    command = printed_command(capsys, str(theta), str(t), *flags)
    assert command.count("--logprobs-mode") == 1 and "raw_logprobs" in command


Q_STAR = ["--ordinary-requests", "q_star"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([*Q_STAR, "--alpha-min", "0.7", "--alpha-max", "0.3"], "alpha_min"),
        ([*Q_STAR, "--alpha-method", "fixed"], "fixed_alpha"),
        ([*Q_STAR, "--fixed-alpha", "0.3"], "alpha_method"),
        (["--alpha-max", "0.5"], "--alpha-max belong to --ordinary-requests q_star"),
        (["--hf-overrides", "{}"], "--hf-overrides"),
        (["--hf_overrides.vocab_size=7"], "--hf-overrides"),
        (["--model=other"], "--model"),
        (["--logits-processors", "mine"], "--logits-processors"),
    ],
)
def test_bad_settings_are_refused(
    theta: Path, t: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-native", str(theta), str(t), *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_other_token_ids_are_refused(theta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_tiny_model(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokens = sorted(vocabulary, key=vocabulary.get)
    tokenizer["model"]["vocab"] = {token: vocabulary[tokens[-1 - i]] for i, token in enumerate(tokens)}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert isinstance(make_tokenizer(), PreTrainedTokenizerFast)
    assert main(["serve-native", str(theta), str(other), "--dry-run"]) == 2
    assert "same token ids" in capsys.readouterr().err


def test_tokens_that_one_model_lacks_are_named(theta: Path, t: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((t / "config.json").read_text())
    other = t.with_name("shorter")
    shutil.copytree(t, other)
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": config["vocab_size"] - 2}))
    assert main(["serve-native", str(theta), str(other), "--dry-run"]) == 0
    assert "warning: 2 tokens (<|im_end|>, <|im_start|>)" in capsys.readouterr().err


def test_a_model_without_a_plain_configuration_is_refused(
    theta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {"vocab_size": 10}}))
    assert main(["serve-native", str(theta), str(tmp_path), "--dry-run"]) == 2
    assert "plain text decoders" in capsys.readouterr().err


def test_one_model_serves_in_both_roles(theta: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = printed_command(capsys, str(theta), "--port", "8000", "--enable-lora", "--model-impl", "vllm")
    flags = dict(itertools.pairwise(command))
    assert flags["--model"] == str(theta) and flags["--port"] == "8000"
    assert flags["--logits-processors"] == "dual_rollout.native.processor:Processor"
    assert flags["--max-loras"] == "2" and "--hf-overrides" not in command
    assert "--max-loras 3" in shlex.join(printed_command(capsys, str(theta), "--enable-lora", "--max-loras", "3"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data-parallel-size=2"], "one server per engine"),
        (["-dp", "2"], "one server per engine"),
        (["--data_parallel_rank", "1"], "one server per engine"),
        (["--api_server_count", "2"], "one process counts the rollouts"),
        (["--speculative-config.method", "ngram"], "no logits processors"),
        (["--ordinary-requests", "q_star"], "needs T"),
    ],
)
def test_flags_that_pairs_do_not_work_with_are_refused(
    theta: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-native", str(theta), *flags, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


def test_an_engine_that_pairs_do_not_work_with_is_refused() -> None:
    """However it was asked for: the flags may be in a file, or of `vllm serve`."""
    parallel = {"data_parallel_size": 1, "pipeline_parallel_size": 1, "_api_process_count": 1}

    def refusal(speculative_config: object = None, **changes: int) -> str | None:
        config = SimpleNamespace(
            parallel_config=SimpleNamespace(**parallel | changes), speculative_config=speculative_config
        )
        try:
            refuse_config(config)
        except ValueError as error:
            return str(error)
        return None

    assert refusal() is None
    assert "start one server per engine" in str(refusal(data_parallel_size=2))
    assert "several API servers" in str(refusal(_api_process_count=2))
    assert "pipeline" in str(refusal(pipeline_parallel_size=2)) and "logits processors" in str(refusal("ngram"))
    assert "on one rank" in str(refusal(enable_batch_sharded_sampling=True))
