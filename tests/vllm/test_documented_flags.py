"""The documents' flags of vLLM are flags of the vLLM that is installed here."""

from __future__ import annotations

import argparse
import re
import subprocess

from dual_rollout.cli import serve_native
from dual_rollout.native.refusals import names_of
from tests.documents import PAGES, arguments_of
from tests.hang import HANG
from tests.vllm.servers import vllm_python

SERVER = ["-m", "vllm.entrypoints.openai.api_server"]


def test_the_documents_flags_of_vllm_are_there() -> None:
    """Those of its API server, and those that `serve-native` hands on to it."""
    parser = argparse.ArgumentParser()
    serve_native.add_parser(parser.add_subparsers())
    named = set()
    for page in PAGES:
        for words in arguments_of("dual-rollout", page):
            if words[0] == "serve-native":
                named |= names_of(parser.parse_known_args(words)[1])
        named |= {name for words in arguments_of("python", page) if words[:2] == SERVER for name in names_of(words[2:])}
    command = [str(vllm_python()), *SERVER, "--help=all"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=HANG)
    assert (
        {"--max-logprobs", "--middleware", "--enable-lora"}
        < named
        <= set(re.findall(r"--[a-z][a-z0-9-]+", shown.stdout))
    )
