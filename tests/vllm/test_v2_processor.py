"""The logits processor as vLLM's V2 model runner calls it, which vLLM has on GPUs alone: there tests/gpu runs it."""

from __future__ import annotations

from tests.vllm.servers import run_in_vllms_python

RUNNER = """
import os
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # nothing is compiled
from dataclasses import fields
from types import SimpleNamespace as Namespace
import numpy as np
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from dual_rollout.config import AlphaRule
from dual_rollout.native.draw import FORCED
from dual_rollout.native.processor import Processor, WorkerExtension
from dual_rollout.native.wire import NUMBERS, Member

VOCAB, SLOTS, MARK = 50, 8, 49
config = Namespace(
    lora_config=None,
    model_config=Namespace(hf_config=Namespace(), get_vocab_size=lambda: VOCAB),
    scheduler_config=Namespace(max_num_seqs=SLOTS))
state = Namespace(
    device=torch.device("cpu"),
    prompt_len=Namespace(np=np.zeros(SLOTS, np.int32)),
    prefill_len=Namespace(np=np.zeros(SLOTS, np.int32)))
processor = Processor(config, state)
generator = torch.Generator().manual_seed(0)

def add(slot, prompt_len, rollout=None, side=None, seed=3):
    state.prompt_len.np[slot] = state.prefill_len.np[slot] = prompt_len
    args = None
    if rollout:
        member = Member(rollout=rollout, side=side, seed=seed, start=0, mark=MARK, rule=AlphaRule(), temperature=1.0)
        args = member.to_extra_args()
    assert processor.add_request(slot, SamplingParams(temperature=0.0, extra_args=args)) == bool(rollout)

def step(lengths, given=None):
    '''The rows of a step, {slot: tokens that its row sees}: what was forced on each, and the logits before it.'''
    rows = torch.randn(len(lengths), VOCAB, generator=generator) if given is None else torch.stack(given)
    logits = rows.clone()
    known = {spec.name: None for spec in fields(LogitsContext)}
    slots, seen = np.array(list(lengths)), np.array(list(lengths.values()))
    context = LogitsContext(**{**known, "idx_mapping_np": slots, "seq_lens_upper_bound_np": seen})
    changed = processor.apply(logits, context)
    forced = {}
    for slot, before, after in zip(lengths, rows, changed, strict=True):
        (where,) = torch.nonzero(before != after, as_tuple=True)
        assert len(where) <= 1 and (after[where] == torch.tensor(FORCED)).all()
        forced[slot] = int(where) if len(where) else None
    return forced, dict(zip(lengths, rows, strict=True))

def record(rollout):
    taken = WorkerExtension().dual_rollout_take([rollout])[rollout]
    return np.frombuffer(taken, np.float32).reshape(-1, len(NUMBERS))
"""

# Prompts that are only partly read draw nothing; a row's number in the step is not its request's; a request that comes
# back after a preemption goes on at its position.
ANY_ORDER = """
add(0, 3); add(5, 4, "a", "theta"); add(2, 7, "a", "t")
forced, _ = step({0: 3, 2: 5})
assert forced == {0: None, 2: None}, forced
tokens, seen = [], []
for lengths in ({0: 4, 5: 4, 2: 7}, {2: 8, 0: 5, 5: 5}, {2: 9, 0: 6, 5: 6}):
    forced, logits = step(lengths)
    assert forced[0] is None and forced[5] == forced[2] is not None, forced
    tokens.append(forced[5]); seen.append(logits)
state.prefill_len.np[5], state.prefill_len.np[2] = 7, 10
forced, logits = step({5: 7, 2: 8})
assert forced[2] is None, "only partly read"
assert forced[5] == MARK, "its partner was not there yet"
forced, logits = step({5: 8, 2: 11})
assert forced[5] == forced[2] is not None
tokens.append(forced[5]); seen.append(logits)
got = record("a")
assert np.isnan(got[3]).all() and got[[0, 1, 2, 4], 0].tolist() == tokens
for row, logits in zip(got[[0, 1, 2, 4]], seen, strict=True):
    token, alpha = int(row[0]), float(row[1])
    theta, t = (logits[slot].double().log_softmax(0) for slot in (5, 2))
    q = ((1 - alpha) * theta + alpha * t).log_softmax(0)
    expected = [q[token], theta[token], t[token], (q.exp() * (q - theta)).sum(), (q.exp() * (q - t)).sum()]
    assert np.allclose(row[2:], [float(value) for value in expected], atol=1e-5), (row, expected)
    assert abs(row[5] - row[6]) < 1e-4
"""

# In slots that were others' in the step before, in any order, beside others.
SEED_AND_POSITION = """
add(5, 4, "b", "theta"); add(2, 7, "b", "t")
first, logits = step({5: 4, 2: 7})
second, later = step({5: 5, 2: 8})
add(5, 7, "c", "t"); add(2, 4, "c", "theta"); add(1, 2, "d", "theta", seed=4); add(7, 2, "d", "t", seed=4)
again, _ = step({5: 7, 1: 2, 2: 4, 7: 2}, [logits[2], logits[5], logits[5], logits[2]])
assert again[5] == again[2] == first[5] and again[1] == again[7]
again, _ = step({2: 5, 5: 8}, [later[5], later[2]])
assert again[2] == second[5]
assert np.array_equal(record("b"), record("c"))
others = []
for i in range(40):
    add(1, 2, f"e{i}", "theta", seed=i); add(7, 2, f"e{i}", "t", seed=i)
    others.append(step({1: 2, 7: 2}, [logits[5], logits[2]])[0][1])
assert len(set(others)) > 5, "other seeds draw other tokens"
"""

# A partner that was aborted, and one at another position; the rollouts beside them go on.
ALONE = """
add(5, 4, "f", "theta"); add(2, 7, "f", "t"); add(1, 2, "g", "theta"); add(7, 3, "g", "t")
forced, _ = step({5: 4, 2: 7, 1: 2, 7: 3})
assert MARK not in forced.values()
forced, _ = step({5: 5, 1: 3, 7: 4})
assert forced[5] == MARK and forced[1] == forced[7] != MARK
assert np.isnan(record("f")[1]).all() and not np.isnan(record("g")).any()
add(5, 4, "h", "theta"); add(2, 7, "h", "t")
forced, _ = step({5: 4, 2: 8})
assert forced[5] == forced[2] == MARK and np.isnan(record("h")).all()
"""


def test_rows_of_the_v2_runner() -> None:
    """In one process, since importing vLLM takes most of it."""
    run_in_vllms_python(RUNNER + ANY_ORDER + SEED_AND_POSITION + ALONE)
