"""Which tokens end a sequence, as far as the model's files say: its EOS, and what its generation config adds."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def stop_token_ids(tokenizer: Any, model: str | None = None) -> frozenset[int]:
    """The tokenizer's EOS, and all that the generation configs in its folder and in that of `model` name.

    Args:
        model: folder or hub name of the weights, which a tokenizer from elsewhere does not know.
    """
    ids = {tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()
    for folder in {tokenizer.name_or_path, model} - {None, ""}:
        ids.update(_generation_config_eos(folder))
    return frozenset(ids)


def _generation_config_eos(model: str) -> list[int]:
    from transformers.utils import cached_file

    try:
        path = cached_file(
            model,
            "generation_config.json",
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        logger.info("no generation config for %s (%s): EOS from the tokenizer alone", model, error)
        return []
    if path is None:
        return []
    eos = json.loads(Path(path).read_text()).get("eos_token_id")
    return [] if eos is None else eos if isinstance(eos, list) else [eos]
