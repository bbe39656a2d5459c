"""What an SGLang server says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from dual_rollout.engine import EngineInfo
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport, shown

MODEL_INFO = ("/model_info", "/get_model_info")
SETTINGS = ("/server_info", "/get_server_info")


async def described(http: HttpTransport, wanted: str | None) -> tuple[EngineInfo, Mapping[str, Any]]:
    """What is served, and the server's settings; `wanted` is the model's name, or that of an adapter it has.

    Raises:
        EngineRejectedError: it serves no model of that name, and no adapters.
        EngineProtocolError: it describes itself with what cannot be.
    """
    model, server = await asyncio.gather(told(http, *MODEL_INFO), told(http, *SETTINGS))
    served = str(server.get("served_model_name") or model.get("model_path"))
    if wanted not in (None, served) and not server.get("enable_lora"):
        raise EngineRejectedError(
            f"serves {served!r}, not {wanted!r}, and has no LoRA adapters: leave theta_model/t_model "
            "unset (a weight update renames the served model)",
            url=http.url,
            status=404,
        )
    longest = server.get("max_req_input_len")  # SGLang refuses prompts from this length on
    root = model.get("tokenizer_path") or model.get("model_path")
    if not isinstance(root, str | None) or not (longest is None or (type(longest) is int and longest > 1)):
        raise EngineProtocolError(
            f"describes itself with model_path {shown(root)} and max_req_input_len {shown(longest)}",
            url=http.url,
        )
    return EngineInfo(served, root, None if longest is None else longest - 1), server


async def told(http: HttpTransport, path: str, old_path: str) -> Mapping[str, Any]:
    """What a server tells of itself, at the path of newer versions or else that of older ones.

    Raises:
        EngineRejectedError: it has neither.
        EngineProtocolError: the answer is no JSON object.
    """
    for candidate in (path, old_path):
        try:
            answer = await http.get(candidate)
        except EngineRejectedError as error:
            if error.status != 404:
                raise
            continue
        if not isinstance(answer, dict):
            raise EngineProtocolError(f"{candidate} answered no JSON object", url=http.url)
        return answer
    raise EngineRejectedError(
        f"has neither {path} nor {old_path}; is it an SGLang server? (theta_engine/t_engine say which kind it is)",
        url=http.url,
        status=404,
    )
