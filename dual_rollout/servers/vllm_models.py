"""What a vLLM server says of the models that it serves."""

from __future__ import annotations

from dual_rollout.engine import EngineInfo
from dual_rollout.exceptions import EngineProtocolError, EngineRejectedError
from dual_rollout.servers.http import HttpTransport, shown


async def served_model(http: HttpTransport, wanted: str | None) -> tuple[EngineInfo, set[str]]:
    """The model, and the names that answers may give for it.

    Args:
        wanted: its served name; the first one listed when None.

    Raises:
        EngineRejectedError: it is not served.
        EngineProtocolError: the answer lists no models.
    """
    answer = await http.get("/v1/models")
    cards = answer.get("data") if isinstance(answer, dict) else None
    if not cards:
        raise EngineProtocolError("/v1/models lists no model", url=http.url)
    if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
        raise EngineProtocolError("/v1/models lists what are no models", url=http.url)
    served = [card["id"] for card in cards]
    name = wanted or served[0]
    if name not in served:
        raise EngineRejectedError(
            f"serves {served}, not {name!r}: set theta_model/t_model to one of these",
            url=http.url,
            status=404,
        )
    card = cards[served.index(name)]
    root, longest = card.get("root"), card.get("max_model_len")
    if not isinstance(root, str | None) or not (longest is None or (type(longest) is int and longest > 0)):
        raise EngineProtocolError(
            f"/v1/models describes {name!r} with root {shown(root)} and max_model_len {shown(longest)}",
            url=http.url,
        )
    # vLLM answers in the first name, whichever was asked for.
    return EngineInfo(name, root, longest, str(card.get("owned_by"))), {name, served[0]}
