"""Who may do what: the embedded server against hostile requests, keys, folders of weights, and code in models."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dual_rollout.cli import main
from dual_rollout.exceptions import DualRolloutError
from dual_rollout.server.access import is_local
from dual_rollout.server.app import MAX_BODY_BYTES
from dual_rollout.server.launch import EmbeddedServer
from dual_rollout.server.model_runner import ModelRunner
from dual_rollout.server.serve import ServeConfig
from dual_rollout.text import load_tokenizer
from dual_rollout.training.weight_sync import weight_folder
from tests.hang import HANG
from tests.warm_servers import WarmServer

PACKAGE = Path(__file__).parents[2] / "dual_rollout"
KEY = "sk-a-secret-of-this-test"
CHANGING = ("/collective_rpc", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/reset_prefix_cache")
FLAGS = ["--max-logprobs", "20", "--max-model-len", "64", "--threads", "1", "--enable-lora"]
FUZZ = settings(
    derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def call(
    url: str, body: Any = None, *, raw: bytes | None = None, key: str | None = None, **headers: str
) -> tuple[int, Any]:
    data = raw if raw is not None else None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data, headers=headers), timeout=HANG) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode("utf-8", "replace")


@pytest.fixture(scope="module")
def open_server(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """Without a key, on all addresses, loading weights from one folder alone."""
    root = tmp_path_factory.mktemp("weights")
    flags = [*FLAGS, "--host", "0.0.0.0", "--weights-dir", str(root)]
    with WarmServer(tiny_models[0], flags, log_path=root.parent / "open.log") as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(tiny_models: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedServer]:
    """With a key, which it has from the client's variable, as in a training run."""
    log = tmp_path_factory.mktemp("locked") / "server.log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DUAL_ROLLOUT_API_KEY", KEY)
        server = EmbeddedServer(tiny_models[0], [*FLAGS, "--max-model-len", "256"], log_path=log)
    with server:
        yield server


@pytest.fixture
def weights_dir(open_server: EmbeddedServer) -> Path:
    return Path(open_server.command[open_server.command.index("--weights-dir") + 1])


def other_address(server: EmbeddedServer) -> str:
    """The server's URL at an address of this machine that is not a loopback one."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing
        except OSError:
            pytest.skip("this machine has a loopback interface alone")
        return f"http://{probe.getsockname()[0]}:{server.port}"


# ---- malformed requests ---------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, -1, 1, 2, 10**9, 2**31, 2**63, 2**64])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "\x00", "1", "token_id:1", "nope", "a" * 3000])
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
SAMPLING = (
    *("max_tokens", "temperature", "seed", "n", "logprobs", "logprob_token_ids", "prompt_logprobs", "logit_bias"),
    *("prompt_logprob_token_ids", "prompt_logprob_start", "stop_token_ids", "ignore_eos", "min_tokens"),
    *("skip_reading_prefix_cache", "top_p", "top_k", "min_p", "stop", "stream", "echo", "suffix", "response_format"),
)
FIELDS = {
    "/v1/completions": ("prompt", "model", "return_token_ids", "request_id", "add_special_tokens", *SAMPLING),
    "/tokenize": ("prompt", "model", "add_special_tokens"),
    "/detokenize": ("tokens", "model"),
    "/collective_rpc": ("method", "kwargs", "args", "timeout"),
    "/v1/load_lora_adapter": ("lora_name", "lora_path", "load_inplace"),
    "/v1/unload_lora_adapter": ("lora_name",),
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": [1, 2], "max_tokens": 1},
    "/inference/v1/generate": {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1}},
    "/tokenize": {"prompt": "a"},
    "/detokenize": {"tokens": [1]},
    "/collective_rpc": {"method": "reload_weights", "kwargs": {"weights_path": "/nowhere"}},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "/nowhere"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
}


def check_answer(path: str, status: int, answer: Any) -> None:
    if status == 500:  # what vLLM too answers when a call inside its engine fails
        assert path == "/collective_rpc" and answer["error"]["message"].startswith("Call to collective_rpc"), answer
    assert status in (200, 400, 403, 404, 500), answer
    if status != 200:
        assert set(answer["error"]) == {"message", "type", "param", "code"} and answer["error"]["code"] == status


@pytest.mark.parametrize("path", FIELDS)
def test_any_json_in_any_field_is_answered(open_server: EmbeddedServer, path: str) -> None:
    @FUZZ
    @given(st.dictionaries(st.sampled_from(FIELDS[path]), JSON, max_size=3))
    def fuzz(fields: dict[str, Any]) -> None:
        check_answer(path, *call(open_server.url + path, {**GOOD[path], **fields}))

    fuzz()
    assert call(open_server.url + "/v1/completions", GOOD["/v1/completions"])[0] == 200


def test_any_sampling_parameter_of_generate_is_answered(open_server: EmbeddedServer) -> None:
    path = "/inference/v1/generate"

    @FUZZ
    @given(
        JSON | st.lists(st.integers(0, 300), max_size=3), st.dictionaries(st.sampled_from(SAMPLING), JSON, max_size=3)
    )
    def fuzz(token_ids: Any, sampling: dict[str, Any]) -> None:
        check_answer(path, *call(open_server.url + path, {"token_ids": token_ids, "sampling_params": sampling}))
        body = {"token_ids": [1, 2], "sampling_params": {"max_tokens": 1, **sampling}}
        check_answer(path, *call(open_server.url + path, body))

    fuzz()
    assert call(open_server.url + path, GOOD[path])[0] == 200


@pytest.mark.parametrize("path", GOOD)
def test_what_is_no_json_object_is_refused(open_server: EmbeddedServer, path: str) -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    for raw in (b"", b"{", b"null", b"[]", b'"a"', b"1e999", b"NaN", b'{"a": "\\ud800"}', b"\xff\xfe", deep):
        status, answer = call(open_server.url + path, raw=raw)
        assert (status, answer["error"]["code"]) == (400, 400), (raw[:20], answer)


def test_a_request_has_a_largest_size(open_server: EmbeddedServer) -> None:
    status, _ = call(open_server.url + "/v1/completions", raw=b" " * (MAX_BODY_BYTES + 1))
    assert status == 413
    status, answer = call(open_server.url + "/v1/completions", {"prompt": [[1]] * 1025})
    assert status == 400 and "maximum allowed count of 1024" in answer["error"]["message"]


# ---- who may change what is served ----------------------------------------------------------------------------------


def test_the_server_binds_to_loopback_unless_told_otherwise() -> None:
    assert ServeConfig(model="m").host == "127.0.0.1"


@pytest.mark.parametrize(
    ("address", "local"),
    [
        *(("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("::ffff:127.0.0.1", True), ("0.0.0.0", False)),
        *(("::ffff:10.0.0.1", False), ("10.0.0.1", False), ("fe80::1%eth0", False), ("localhost", False)),
        *(("", False), (None, False)),
    ],
)
def test_who_counts_as_local(address: str | None, local: bool) -> None:
    assert is_local(address) is local


@pytest.mark.parametrize("path", CHANGING)
def test_other_machines_change_nothing_without_a_key(open_server: EmbeddedServer, path: str) -> None:
    url = other_address(open_server)
    assert call(url + "/v1/completions", GOOD["/v1/completions"])[0] == 200
    status, answer = call(url + path, GOOD.get(path, {}))
    assert status == 403 and "VLLM_API_KEY" in answer["error"]["message"]
    assert "VLLM_API_KEY" not in str(call(open_server.url + path, GOOD.get(path, {})))


@pytest.mark.parametrize("path", CHANGING)
def test_web_pages_change_nothing(open_server: EmbeddedServer, path: str) -> None:
    """A page in a browser of this machine reaches loopback, and always says where it comes from."""
    assert call(open_server.url + path, GOOD.get(path, {}), Origin="http://evil.example")[0] == 403


def test_a_key_is_needed_where_one_is_set(locked_server: EmbeddedServer) -> None:
    url = locked_server.url
    assert call(url + "/health")[0] == 200
    for path in ("/v1/models", "/metrics", "/version"):
        assert call(url + path)[0] == 401
        assert call(url + path, key=KEY)[0] == 200
    for path, body in GOOD.items():
        for wrong in (None, "", KEY[:-1], KEY + "x", "\xff"):
            assert call(url + path, body, key=wrong)[0] == 401
    assert call(url + "/v1/completions", GOOD["/v1/completions"], key=KEY)[0] == 200
    assert call(url + "/reset_prefix_cache", {}, key=KEY) == (200, {"success": True})


def test_the_key_is_in_no_command_and_no_log(locked_server: EmbeddedServer) -> None:
    assert not any(KEY in word for word in locked_server.command)
    assert "serving on" in locked_server.log_path.read_text()
    assert KEY not in locked_server.log_path.read_text()


# ---- weights --------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def reload_weights(server: EmbeddedServer, folder: Path) -> tuple[int, str]:
    body = {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}}
    status, answer = call(server.url + "/collective_rpc", body)
    return status, str(answer)


def test_weights_come_from_inside_the_folder_alone(
    open_server: EmbeddedServer, weights_dir: Path, tiny_models: tuple[Path, Path], tmp_path: Path
) -> None:
    weights = tiny_models[0] / "model.safetensors"
    inside, outside = weights_dir / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        shutil.copy(weights, folder)
    (weights_dir / "link").symlink_to(outside)
    (weights_dir / "linked_file").mkdir()
    (weights_dir / "linked_file/model.safetensors").symlink_to(weights)
    assert reload_weights(open_server, inside)[0] == 200
    for folder in (outside, weights_dir / "link", weights_dir / "linked_file", weights_dir / "../../outside"):
        status, answer = reload_weights(open_server, folder)
        assert status == 403 and "--weights-dir" in answer
        body = {"lora_name": "a", "lora_path": str(folder)}
        assert call(open_server.url + "/v1/load_lora_adapter", body)[0] == 403


def test_pickled_weights_are_not_read(open_server: EmbeddedServer, weights_dir: Path, tmp_path: Path) -> None:
    folder, made = weights_dir / "pickled", tmp_path / "made"
    folder.mkdir()
    for name in ("pytorch_model.bin", "adapter_model.bin", "model.safetensors", "adapter_model.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb(made)))
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}')
    body = {"lora_name": "a", "lora_path": str(folder)}
    assert reload_weights(open_server, folder)[0] == 500
    assert call(open_server.url + "/v1/load_lora_adapter", body)[0] == 500
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").unlink()
    assert "neither model.safetensors nor" in reload_weights(open_server, folder)[1]
    assert call(open_server.url + "/v1/load_lora_adapter", body)[0] == 404
    assert not made.exists()
    pickle.loads(pickle.dumps(Bomb(made)))
    assert made.exists()


@pytest.mark.parametrize(
    "index",
    [
        {"weight_map": {"a": "../inside.safetensors"}},
        {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": 3}},
        {"weight_map": []},
        [],
        {},
    ],
    ids=str,
)
def test_an_index_names_files_of_its_own_folder(open_server: EmbeddedServer, weights_dir: Path, index: Any) -> None:
    folder = weights_dir / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    status, answer = reload_weights(open_server, folder)
    assert status == 500 and re.search("outside its folder|not an index|No such file", answer)


def test_the_trainers_weights_stay_in_the_runs_folder(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    elsewhere.mkdir()
    assert weight_folder(run, None) == run / "theta_weights"
    assert weight_folder(run, elsewhere).parent == elsewhere  # asked for by name
    assert weight_folder(run, elsewhere) != weight_folder(run.parent / "another", elsewhere)
    (run / "theta_weights").symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"theta_weights leads to .*elsewhere"):
        weight_folder(run, None)


# ---- code -----------------------------------------------------------------------------------------------------------


def test_code_that_comes_with_a_model_is_not_run(tiny_models: tuple[Path, Path], tmp_path: Path) -> None:
    """Refused, or passed over for transformers' own class; and nobody is asked at a prompt."""
    folder, made = tmp_path / "model", tmp_path / "made"
    shutil.copytree(tiny_models[0], folder)
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(made)!r})\nclass Evil: pass\n")
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        path, reference = folder / name, "evil.Evil" if name == "config.json" else [None, "evil.Evil"]
        content = json.loads(path.read_text())
        content["auto_map"] = {key: reference, **({"AutoConfig": reference} if name == "config.json" else {})}
        content.pop("model_type", None)
        content["tokenizer_class"] = "Evil"
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"trust_remote_code|model_type|Evil"):
        load_tokenizer(str(folder), local_files_only=True)
    with pytest.raises(ValueError, match=r"trust_remote_code|model_type"):
        ModelRunner(str(folder), dtype="auto", max_model_len=None)
    assert not made.exists()


def test_nothing_unpickles_or_trusts_remote_code() -> None:
    """Read from the source. Checkpoints are resumed by transformers, which loads tensors and numbers alone."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert isinstance(node.value, ast.Constant) and node.value.value is False, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert not re.search(r"\b(pickle|dill|cloudpickle|marshal|shelve)\b|torch\.load$", called), path
                assert called not in ("eval", "exec", "os.system", "yaml.load"), path


def test_tensors_survive_their_file(tmp_path: Path) -> None:
    """What replaces pickle does carry weights."""
    import torch

    save_file({"a": torch.arange(3.0)}, tmp_path / "model.safetensors")
    assert load_file(tmp_path / "model.safetensors")["a"].tolist() == [0.0, 1.0, 2.0]


# ---- keys -----------------------------------------------------------------------------------------------------------


def test_a_wrong_key_is_named_and_not_shown(
    locked_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    from dual_rollout import CoordinatorConfig, generate_with_optimal_sampling

    config = CoordinatorConfig(theta_url=locked_server.url, t_url=locked_server.url + "/", top_k=5, max_retries=0)
    caplog.set_level(0)
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", KEY)
    (output,) = asyncio.run(generate_with_optimal_sampling([[1, 2]], config, max_tokens=2))
    assert output.error is None and len(output.generated_tokens) > 0
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", "sk-wrong-one")
    with pytest.raises(DualRolloutError, match="401") as caught:
        asyncio.run(generate_with_optimal_sampling([[1, 2]], config, max_tokens=2))
    shown = f"{caught.value!r} {caught.value} {caplog.text} {output!r} {config!r}"
    assert KEY not in shown and "sk-wrong-one" not in shown


def test_a_run_leaves_no_key_behind(
    locked_server: EmbeddedServer,
    tiny_models: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A training run whose server asks for the key works, and writes it nowhere: model, card, metrics, logs."""
    monkeypatch.setenv("DUAL_ROLLOUT_API_KEY", KEY)
    folder = tmp_path / "out"
    flags = {
        "model_name_or_path": tiny_models[0],
        "dual_theta_url": locked_server.url,
        "dual_t_url": locked_server.url,
        "dual_task": "chain_sum",
        "dual_task_size": 4,
        "dual_top_k": 20,
        "output_dir": folder,
        "max_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "max_completion_length": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
    }
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    assert (
        main(["train", str(recipe), *(word for key, value in flags.items() for word in (f"--{key}", str(value)))]) == 0
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "metrics.jsonl", "README.md", "training_args.bin"} <= {p.name for p in files}
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
    shown = capfd.readouterr()
    assert KEY not in shown.out + shown.err + locked_server.log_path.read_text()
    assert not list((folder / "theta_weights").glob("step-*"))
