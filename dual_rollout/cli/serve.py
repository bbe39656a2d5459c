"""``dual-rollout serve``: the embedded server."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add the ``serve`` command; flags are spelled as vLLM's."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a small model over vLLM's HTTP API, without vLLM and without a GPU",
        description="A small stand-in for `vllm serve` on machines without a GPU. Real loads belong on vLLM.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("model", help="folder with a transformers model (safetensors) and its tokenizer")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; set VLLM_API_KEY too before other machines can reach it",
    )
    parser.add_argument("--port", type=int, default=8000, help="port to listen on; 0 takes a free one")
    parser.add_argument("--served-model-name", nargs="+", default=[], help="names to serve; the folder by default")
    parser.add_argument("--max-model-len", type=int, help="longest sequence in tokens; the model's own by default")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="most sequences in one step")
    parser.add_argument("--max-logprobs", type=int, default=20, help="most log-probabilities per token; -1: no cap")
    parser.add_argument(
        "--logprobs-mode",
        choices=["raw_logprobs", "processed_logprobs"],
        default="raw_logprobs",
        help="report log-probabilities of the model itself, or of what is sampled from (temperature, bias)",
    )
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="auto: bfloat16 if stored so"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of requests that bring none")
    parser.add_argument("--kv-cache-gib", type=float, default=1.0, help="memory for keys and values, GiB")
    parser.add_argument("--threads", type=int, help="torch threads; torch's default if not given")
    parser.add_argument("--enable-lora", action="store_true", help="allow loading LoRA adapters at run time")
    parser.add_argument(
        "--until-stdin-ends", action="store_true", help="stop when standard input ends, as a pipe does with its writer"
    )
    parser.add_argument("--weights-dir", help="folder that new weights and adapters must lie in; anywhere if not given")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT."""
    from dual_rollout.server.serve import ServeConfig, serve

    names = ServeConfig.__dataclass_fields__
    values = {name: value for name, value in vars(args).items() if name in names}
    return serve(ServeConfig(**{**values, "served_model_name": tuple(args.served_model_name)}))
