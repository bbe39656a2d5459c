"""The Triton kernel that draws on GPUs, by Triton's interpreter on a CPU; `tests/gpu` has it compiled."""

from __future__ import annotations

from tests.vllm.servers import run_in_vllms_python


def test_the_kernel_draws_what_torch_does() -> None:
    """Of one model, and of two whose vocabularies differ. The interpreter has neither a device nor libdevice."""
    program = """
import contextlib, os
os.environ["TRITON_INTERPRET"] = "1"
from types import SimpleNamespace
import torch
import triton.language as tl
from dual_rollout.config import AlphaRule
from dual_rollout.native import kernel
from dual_rollout.native.draw import FORCED, draw, pack, unpack
from dual_rollout.native.wire import NUMBERS, Member
kernel.libdevice = SimpleNamespace(log1p=lambda x: tl.log(1.0 + x))
torch.cuda.device = lambda device: contextlib.nullcontext()

pairs, vocab = 5, 5000
rules = [({}, 1.0), ({}, 0.7), ({"alpha_max": 0.2}, 1.0), *(
    ({"alpha_method": "fixed", "fixed_alpha": alpha}, 1.0) for alpha in (0.3, 1.0))]
members = [Member(rollout="a", side="theta", seed=i + (i << 40), start=0, mark=0, rule=AlphaRule(**rule),
    temperature=temperature) for i, (rule, temperature) in enumerate(rules)]
generator = torch.Generator().manual_seed(0)
theta, noise = (3.0 * torch.randn(pairs, vocab, generator=generator) for _ in range(2))
logits = torch.stack((theta, 0.95 * theta + 0.3 * noise), 1).reshape(2 * pairs, vocab)
logits[0, : vocab // 4], logits[1, vocab // 2 :] = -torch.inf, -torch.inf  # tokens that one side cannot say
for two_models in (False, True):
    columns = torch.from_numpy(pack([(2 * i, 2 * i + 1) for i in range(pairs)], members, [5] * pairs, range(pairs)))
    forced, record = logits.clone(), torch.zeros(pairs, len(NUMBERS))
    logits_t = (0.9 * logits)[:, : vocab - 100].contiguous() if two_models else forced
    _, numbers = draw(logits, logits_t, unpack(columns))
    kernel.draw_in_place(forced, logits_t, columns, record)
    torch.testing.assert_close(record, numbers, atol=2e-5, rtol=1e-5)
    both = torch.arange(2 * pairs), record[:, 0].long().repeat_interleave(2)
    assert (forced[both] == FORCED).all() and (forced != logits).sum() == 2 * pairs
    assert columns[4].tolist() == [6] * pairs and columns[5].tolist() == list(range(1, pairs + 1))
"""
    run_in_vllms_python(program)
