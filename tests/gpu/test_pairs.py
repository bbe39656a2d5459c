"""Pairs on GPUs: the kernel against the same in torch, and a real server, on one card and on two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dual_rollout.config import AlphaRule
from dual_rollout.native.draw import FORCED, draw, pack, unpack
from dual_rollout.native.wire import NUMBERS, Member
from tests.chi_square import chi_square_p_value
from tests.tiny_model import make_tiny_model, perturbed_copy
from tests.vllm.pairs import Pairs, distribution_p_value, largest_errors, prompts_of
from tests.vllm.servers import NativeServer

RULES = (
    (AlphaRule(), 1.0),
    (AlphaRule(), 0.7),
    (AlphaRule(alpha_max=0.2), 1.0),
    (AlphaRule(alpha_method="fixed", fixed_alpha=0.3), 1.0),
    (AlphaRule(alpha_method="fixed", fixed_alpha=1.0), 1.0),
)


def members(count: int, rules: Any = RULES) -> list[Member]:
    chosen = [rules[i % len(rules)] for i in range(count)]
    return [
        Member(rollout="a", side="theta", seed=i + (i << 40), start=0, mark=0, rule=rule, temperature=temperature)
        for i, (rule, temperature) in enumerate(chosen)
    ]


def rows_of(pairs: int, vocab: int) -> torch.Tensor:
    """Logits of both sides, which are near, with tokens that one side or the other cannot say."""
    generator = torch.Generator(device="cuda").manual_seed(pairs)
    theta, noise = (3.0 * torch.randn(pairs, vocab, generator=generator, device="cuda") for _ in range(2))
    rows = torch.stack((theta, 0.95 * theta + 0.3 * noise), 1).reshape(2 * pairs, vocab)
    rows[0, : vocab // 4], rows[1, vocab // 2 :] = -torch.inf, -torch.inf
    return rows


def packed(pairs: int) -> torch.Tensor:
    rows = [(2 * i, 2 * i + 1) for i in range(pairs)]
    return torch.from_numpy(pack(rows, members(pairs), [5] * pairs, range(pairs))).cuda()


@pytest.mark.parametrize("pairs", [1, 5, 64])
@pytest.mark.parametrize("vocab", [1000, 49152, 151936])
@pytest.mark.parametrize("two_models", [False, True], ids=["one model", "two models"])
def test_the_kernel_draws_what_torch_does(pairs: int, vocab: int, two_models: bool) -> None:
    """Of two models, π_t's logits are in a tensor of their own, and its vocabulary is shorter."""
    from dual_rollout.native.kernel import draw_in_place

    logits, columns, record = rows_of(pairs, vocab), packed(pairs), torch.zeros(pairs, len(NUMBERS), device="cuda")
    forced = logits.clone()
    logits_t = (0.9 * logits)[:, : vocab - 100].contiguous() if two_models else forced
    _, numbers = draw(logits, logits_t, unpack(columns))
    draw_in_place(forced, logits_t, columns, record)
    same = record[:, 0] == numbers[:, 0]  # else two clocks rang within a rounding of each other
    assert same.float().mean() >= 0.98
    torch.testing.assert_close(record[same], numbers[same], atol=2e-5, rtol=1e-5)
    both = torch.arange(2 * pairs, device="cuda"), record[:, 0].long().repeat_interleave(2)
    assert (forced[both] == FORCED).all() and (forced != logits).sum() == 2 * pairs
    assert columns[4].tolist() == [6] * pairs and columns[5].tolist() == list(range(1, pairs + 1))


def test_the_kernels_draws_follow_the_distribution() -> None:
    """Chi-square over 20,000 seeds, false alarm one in 10,000."""
    from dual_rollout.native.kernel import draw_in_place

    count, vocab = 20_000, 300
    logits = rows_of(2, vocab)[2:]
    rows = [(2 * i, 2 * i + 1) for i in range(count)]
    columns = torch.from_numpy(pack(rows, members(count, RULES[:1]), [0] * count, range(count))).cuda()
    record, many = torch.zeros(count, len(NUMBERS), device="cuda"), logits.repeat(count, 1)
    draw_in_place(many, many, columns, record)
    alpha, logp = record[0, 1].double(), logits.double().log_softmax(1)
    expected = ((1 - alpha) * logp[0] + alpha * logp[1]).softmax(0).cpu().numpy()
    drawn = np.bincount(record[:, 0].long().cpu().numpy(), minlength=vocab)
    assert chi_square_p_value(drawn, count * expected) > 1e-4


MODEL = os.environ.get("DUAL_ROLLOUT_GPU_MODEL")
FLOAT32 = {"TRITON_F32_DEFAULT": "ieee"}  # or attention multiplies in TF32
GRAPHS = '{"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}'  # CUDA graphs without the minutes of compiling
TOLERANCE = 2e-3  # nats; vLLM's kernels against transformers', both in float32


def plugin(folder: Path) -> Path:
    """What vLLM finds the class of two models by, where this project is on the path and not installed."""
    metadata = folder / "plugin" / "dual_rollout-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: dual_rollout\nVersion: 0.1.0\n")
    (metadata / "entry_points.txt").write_text("[vllm.general_plugins]\ndual_rollout = dual_rollout.native:register\n")
    return metadata.parent


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("two_models", [False, True], ids=["one model", "two models"])
def test_a_real_server_on_every_rank(ranks: int, two_models: bool, tmp_path: Path) -> None:
    """Every number against transformers and the tokens against q*, with tensor parallelism too, where each rank draws
    for itself. Chi-square, false alarm one in 10,000.

    Needs vLLM, in this Python (`DUAL_ROLLOUT_VLLM_PYTHON=$(which python3)`) or another, and no network. The model is
    the folder `DUAL_ROLLOUT_GPU_MODEL`, a tiny one when unset; `VLLM_USE_V2_MODEL_RUNNER` chooses the runner.
    """
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"{torch.cuda.device_count()} GPU, and this is of {ranks}")
    folder = Path(MODEL) if MODEL else make_tiny_model(tmp_path / "model", hidden_size=128)
    target = perturbed_copy(folder, tmp_path / "target", noise=0.1) if two_models else None
    if target is not None and MODEL:
        AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    devices = ",".join(map(str, range(ranks)))
    flags = (
        f"--tensor-parallel-size={ranks}",
        f"--distributed-executor-backend={'mp' if ranks > 1 else 'uni'}",
        "--no-enforce-eager",
        f"--compilation-config={GRAPHS}",
        "--max-num-seqs=64",
        "--gpu-memory-utilization=0.05",  # fits beside other work
        "--kv-cache-memory-bytes=500000000",
    )
    environment = {
        "CUDA_VISIBLE_DEVICES": devices,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "PYTHONPATH": os.pathsep.join([str(plugin(tmp_path)), *filter(None, [os.environ.get("PYTHONPATH")])]),
        **FLOAT32,
    }
    log = Path(os.environ.get("DUAL_ROLLOUT_GPU_LOGS", tmp_path)) / f"ranks{ranks}-models{1 + two_models}.log"
    with NativeServer(folder, target, flags=flags, environment=environment, log=log) as server:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().cuda()
        t = None if target is None else AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval().cuda()
        pairs, prompts = Pairs(server, model), prompts_of(24, seed=1)
        if two_models:  # half of them of one request
            prompts[::2] = [(prompt, prompt) for prompt, _ in prompts[::2]]
        rollouts = pairs.rollouts(prompts, [{"max_tokens": 48, "seed": i} for i in range(24)])
        errors = largest_errors(rollouts, model, t)
        restarts = sum(rollout["restarts"] for rollout in rollouts)
        print(f"{ranks} ranks, {1 + two_models} models: {errors}, {restarts} restarts")
        assert max(errors.values()) < TOLERANCE, errors
        assert distribution_p_value(rollouts, model, t) > 1e-4
        assert sum(map(pairs.fell_apart, rollouts)) <= 2
        again = pairs.rollouts(prompts[:3], [{"max_tokens": 48, "seed": i} for i in range(3)])
        same = [one["token_ids"] == other["token_ids"] for one, other in zip(rollouts, again, strict=False)]
        assert sum(same) >= 2, "the same seeds give other tokens, and roundings do not account for that"
