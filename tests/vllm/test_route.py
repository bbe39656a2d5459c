"""The route of rollouts with an engine that says exactly what a real one cannot be made to say."""

from __future__ import annotations

from tests.vllm.servers import run_in_vllms_python

ENGINE = """
import asyncio
from types import SimpleNamespace as Namespace
import numpy as np
from dual_rollout.native.route import Limits, RolloutRequest, RolloutServer

class Engine:
    model_config = Namespace(get_vocab_size=lambda: 100, max_model_len=1000, hf_config=Namespace())
    def __init__(self, prefix_caching=True, budget=2000):
        self.vllm_config = Namespace(
            scheduler_config=Namespace(max_num_seqs=10, max_num_batched_tokens=budget),
            cache_config=Namespace(enable_prefix_caching=prefix_caching, block_size=16))
        self.asked = []

def serve(engine):
    return RolloutServer(Namespace(engine_client=engine, openai_serving_models=Namespace(lora_requests={})))

def rollout(**fields):
    limits = Limits(100, 100, 1000, frozenset(), frozenset())
    return RolloutRequest.from_json({"prompt_token_ids": [1] * 300, "t_prompt_token_ids": [2] * 400, **fields}, limits)
"""

# Without cached prefixes two prompts that do not fit into one step would be read anew, and fall apart anew, for ever.
NEVER_IN_STEP = """
def refusal(engine, max_tokens=10):
    try:
        serve(engine).check_steps(rollout(max_tokens=max_tokens))
    except ValueError as error:
        return str(error)
assert refusal(Engine()) is refusal(Engine(prefix_caching=False)) is None
assert "--max-num-batched-tokens 712 or more" in refusal(Engine(prefix_caching=False, budget=711), max_tokens=1)
assert "--max-num-batched-tokens 42 or more" in refusal(Engine(budget=41))
"""

# Two adapters, and a server with one place: each step has room for one side.
TWO_ADAPTERS_IN_ONE_PLACE = """
server = serve(Engine())
server._state.openai_serving_models.lora_requests = {"a": None, "b": None}
server._engine.vllm_config.lora_config = Namespace(max_loras=1)
def named(model, t_model):
    limits = Limits(100, 100, 1000, frozenset(), frozenset(("a", "b")))
    prompts = {"prompt_token_ids": [1], "t_prompt_token_ids": [2], "max_tokens": 1}
    server.check_adapters(RolloutRequest.from_json({**prompts, "model": model, "t_model": t_model}, limits))
named("a", "a"), named("a", None), named(None, "b")
try:
    named("a", "b")
except ValueError as error:
    assert "a and b" in str(error) and "--max-loras 2" in str(error)
else:
    raise AssertionError("not refused")
"""

# First π_t is gone after two tokens, then the last token is a mark, then both go on to the end.
OF_DIFFERENT_LENGTHS = """
script = [((5, 6, 7), (5, 6), (5, 6, 7)), ((8, 99), (8, 99), (8, None)), ((9,), (9,), (9,))]
class Scripted(Engine):
    async def generate(self, prompt, params, request_id, lora_request):
        self.asked.append((request_id.rpartition("-")[2], len(prompt["prompt_token_ids"]), params.max_tokens))
        theta, t, self.record = script[(len(self.asked) - 1) // 2]
        tokens = theta if request_id.endswith("theta") else t
        yield Namespace(outputs=[Namespace(token_ids=tokens)])
    async def abort(self, request_ids):
        pass
    async def collective_rpc(self, method, args):
        rows = [[np.nan] * 7 if token is None else [token, *[0.5] * 6] for token in self.record]
        return [{name: np.array(rows, np.float32).tobytes() for name in args[0]}]
engine = Scripted()
answer = asyncio.run(serve(engine).generate(rollout(max_tokens=4)))
assert answer["token_ids"] == [5, 6, 8, 9] and answer["restarts"] == 2, answer
assert sorted(engine.asked) == sorted(
    [("theta", 300, 4), ("t", 400, 4), ("theta", 302, 2), ("t", 402, 2), ("theta", 303, 1), ("t", 403, 1)])
"""

# With tensor parallelism each rank draws for itself; real ranks agree.
RANKS_THAT_DIFFER = """
class Ranks(Engine):
    async def generate(self, prompt, params, request_id, lora_request):
        yield Namespace(outputs=[Namespace(token_ids=(5, 6))])
    async def collective_rpc(self, method, args):
        def record(last): return np.array([[5, *[0.5] * 6], [last, *[0.5] * 6]], np.float32).tobytes()
        return [{name: record(token) for name in args[0]} for token in (6, self.of_the_other)]
engine = Ranks()
engine.of_the_other = 6
assert asyncio.run(serve(engine).generate(rollout(max_tokens=2)))["token_ids"] == [5, 6]
engine.of_the_other = 7
try:
    asyncio.run(serve(engine).generate(rollout(max_tokens=2)))
except RuntimeError as error:
    assert "different tokens" in str(error)
else:
    raise AssertionError("not seen")
"""

# As uvicorn starts the server, without the engines.
SEVERAL_ENGINES = """
from dual_rollout.native.route import RolloutMiddleware
sent = []
async def start(data_parallel_size):
    async def send(message): sent.append(message)
    async def app(scope, receive, send): sent.append("started")
    parallel = Namespace(data_parallel_size=data_parallel_size, pipeline_parallel_size=1)
    config = Namespace(parallel_config=parallel, speculative_config=None)
    from fastapi import FastAPI
    served = FastAPI()
    served.state.engine_client = Namespace(vllm_config=config)
    await RolloutMiddleware(app)({"type": "lifespan", "app": served}, None, send)
asyncio.run(start(1))
asyncio.run(start(2))
assert sent[0] == "started" and sent[1]["type"] == "lifespan.startup.failed" and len(sent) == 2, sent
assert "one server per engine" in sent[1]["message"]
"""


def test_what_a_real_engine_does_not_show() -> None:
    """In one process, since importing vLLM takes most of it."""
    programs = (NEVER_IN_STEP, TWO_ADAPTERS_IN_ONE_PLACE, OF_DIFFERENT_LENGTHS, RANKS_THAT_DIFFER, SEVERAL_ENGINES)
    run_in_vllms_python(ENGINE + "".join(programs))
