"""vLLM's flags of the documents, and their values, are such that the vLLM that is installed here takes them."""

from __future__ import annotations

import argparse

from dual_rollout.cli import serve_native
from dual_rollout.native.refusals import names_of
from dual_rollout.sessions.wire import MIDDLEWARE, SCHEDULER
from tests.documents import PAGES, arguments_of
from tests.vllm.servers import run_in_vllms_python

SERVER = ["-m", "vllm.entrypoints.openai.api_server"]
# As its API server reads them: it ends with an error where it does not know one.
READ = """
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
for flags in {lines!r}:
    parser.parse_args(flags)
"""


def test_vllm_takes_the_documents_flags() -> None:
    """Those of its API server, and those that `serve-native` hands on to it."""
    parser = argparse.ArgumentParser()
    serve_native.add_parser(parser.add_subparsers())
    lines = []
    for page in PAGES:
        for words in arguments_of("dual-rollout", page):
            if words[0] == "serve-native":
                lines.append(parser.parse_known_args(words)[1])
        lines += [words[2:] for words in arguments_of("python", page) if words[:2] == SERVER]
    lines = [[word for word in words if word != "..."] for words in lines]
    assert {"--max-logprobs", "--middleware", "--enable-lora"} < {name for words in lines for name in names_of(words)}
    assert any({MIDDLEWARE, SCHEDULER} < set(words) for words in lines), "those of sessions"
    run_in_vllms_python(READ.format(lines=lines))
