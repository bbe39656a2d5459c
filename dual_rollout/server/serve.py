"""Start the embedded server and run it until SIGTERM or SIGINT."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger("dual_rollout.server")

SHUTDOWN_S = 1.0
API_KEY_VARIABLE = "VLLM_API_KEY"


@dataclass(frozen=True)
class ServeConfig:
    """Flags of ``dual-rollout serve``; same names and meaning as vLLM's where vLLM has them."""

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_logprobs: int = 20
    logprobs_mode: str = "raw_logprobs"
    dtype: str = "auto"
    seed: int = 0
    kv_cache_gib: float = 1.0
    threads: int | None = None
    enable_lora: bool = False
    weights_dir: str | None = None
    until_stdin_ends: bool = False

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"--{name.replace('_', '-')} must be in [{low}, {high:g}], got {value}")


_RANGES = (
    ("port", 0, 65535),
    ("max_model_len", 1, math.inf),
    ("max_num_seqs", 1, 65536),
    ("max_logprobs", -1, math.inf),
    ("kv_cache_gib", 0, 2**20),
    ("threads", 1, 4096),
    ("seed", 0, 2**63 - 1),
)


def serve(config: ServeConfig) -> int:
    """Serve until a signal; the exit status. A taken port is reported before the model is loaded.

    The key that clients must bring is read from the environment variable `VLLM_API_KEY`.

    Raises:
        ValueError: the model cannot be served so.
        OSError: the address cannot be listened on, or the model cannot be read.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(levelname)s %(message)s")
    try:
        listener = _bind(config.host, config.port)
    except OSError as error:
        raise OSError(f"cannot listen on {config.host}:{config.port}: {error.strerror}") from error
    api_key = os.environ.get(API_KEY_VARIABLE, "").strip() or None
    with listener:
        if not Path(config.model).is_dir():
            raise ValueError(f"{config.model} is not a folder with a transformers model")
        if api_key is None and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            logger.warning(
                "whoever reaches %s may generate here; set %s to let in only who brings that key",
                config.host,
                API_KEY_VARIABLE,
            )
        app, scheduler = _build(config, api_key)
        scheduler.start()
        asyncio.run(_run(app, listener, scheduler, config.until_stdin_ends))
    if not scheduler.close(SHUTDOWN_S):
        # A long step is still running and nobody waits for its result any more.
        sys.stderr.flush()
        os._exit(0)
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A socket that listens already, because two may bind one port until one of them listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError:
        listener.close()
        raise
    return listener


def _build(config: ServeConfig, api_key: str | None) -> tuple[Any, Any]:
    """The aiohttp application and the scheduler; ValueError and OSError say what to change."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    from dual_rollout.server.access import Access
    from dual_rollout.server.app import EmbeddedApp
    from dual_rollout.server.model_runner import ModelRunner
    from dual_rollout.server.prefix_cache import PrefixCache
    from dual_rollout.server.protocol import Limits
    from dual_rollout.server.scheduler import Scheduler
    from dual_rollout.server.served_models import ServedModels

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    started = time.perf_counter()
    runner = ModelRunner(config.model, dtype=config.dtype, max_model_len=config.max_model_len)
    tokenizer = AutoTokenizer.from_pretrained(config.model, trust_remote_code=False)
    generation = GenerationConfig.from_model_config(runner.model.config)
    if Path(config.model, "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(config.model)
    budget = int(config.kv_cache_gib * 2**30)
    cache = PrefixCache(runner.kv_shape, budget, runner.max_model_len, max(1024, 4 * config.max_num_seqs))
    if cache.bytes_for(runner.max_model_len) > budget:
        raise ValueError(
            f"one sequence of {runner.max_model_len} tokens needs "
            f"{cache.bytes_for(runner.max_model_len) / 2**30:.3g} GiB of keys and values, more than "
            "--kv-cache-gib "
            f"{config.kv_cache_gib:g}: raise it or lower --max-model-len"
        )
    eos = generation.eos_token_id
    eos_ids = frozenset([eos] if isinstance(eos, int) else eos or []) | ({tokenizer.eos_token_id} - {None})
    scheduler = Scheduler(
        runner,
        cache,
        max_num_seqs=config.max_num_seqs,
        processed_logprobs=config.logprobs_mode == "processed_logprobs",
        eos_ids=eos_ids,
        seed=config.seed,
    )
    limits = Limits(
        vocab_size=runner.vocab_size,
        max_model_len=runner.max_model_len,
        max_logprobs=config.max_logprobs,
        max_num_seqs=config.max_num_seqs,
    )
    models = ServedModels(scheduler, runner, path=config.model, names=list(config.served_model_name) or [config.model])
    access = Access(api_key, config.weights_dir)
    app = EmbeddedApp(scheduler, models, tokenizer, limits, access, lora=config.enable_lora)
    logger.info(
        "loaded %s (%s) in %.1f s; room for %.3g sequences of %d tokens",
        config.model,
        str(runner.dtype).removeprefix("torch."),
        time.perf_counter() - started,
        budget / cache.bytes_for(runner.max_model_len),
        runner.max_model_len,
    )
    return app.routes(), scheduler


async def _run(app: Any, listener: socket.socket, scheduler: Any, until_stdin_ends: bool) -> None:
    from aiohttp import web

    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if until_stdin_ends:

        def read_to_end() -> None:
            while os.read(sys.stdin.fileno(), 4096):
                pass
            loop.call_soon_threadsafe(stop.set)

        threading.Thread(target=read_to_end, name="stdin", daemon=True).start()
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    await web.SockSite(runner, listener).start()
    host, port = listener.getsockname()[:2]
    logger.info("serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
    await stop.wait()
    logger.info("shutting down")
    await asyncio.to_thread(scheduler.close, SHUTDOWN_S / 2)
    await runner.cleanup()
