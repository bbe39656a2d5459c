"""The columns of a shard: what a row of the output holds, and of which types.

What there is of each token comes from `SequenceRecord`: a new number per token is a line in `dual_rollout.record`.
"""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dual_rollout.production.rows import Columns, Row
from dual_rollout.record import COUNTS, KEPT_DIAGNOSTICS, STORED_COLUMNS, output_name
from dual_rollout.types import GenerationOutput

_ARROW_TYPES = {int: pa.int32(), float: pa.float64(), bool: pa.bool_()}


def output_schema(source: pa.Schema, columns: Columns, *, diagnostics: bool = False) -> pa.Schema:
    """The columns of the output, with the types of those that come from the input.

    Args:
        diagnostics: whether `KEPT_DIAGNOSTICS` are among them.

    Raises:
        ValueError: a column that JSON or Parquet cannot hold, prompts that are none, a column with the name of another.
    """
    kind = _prompt_type(source, columns.prompt)
    fields = [("index", pa.int64()), ("generation", pa.int32()), ("prompt", kind)]
    if columns.t_prompt is not None:
        fields.append(("t_prompt", _prompt_type(source, columns.t_prompt)))
    elif columns.has_template:
        if pa.types.is_list(kind) and not pa.types.is_struct(kind.value_type):
            raise ValueError(
                "--t-prompt-template and --t-system-prompt need text or chat messages, but column "
                f"{columns.prompt} has token ids"
            )
        fields.append(("t_prompt", kind))
    fields += [
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("generated_text", pa.string()),
        ("finish_reason", pa.string()),
        *((output_name(name), pa.list_(_ARROW_TYPES[entry])) for name, entry in STORED_COLUMNS.items()),
        *((name, pa.list_(pa.float64())) for name in KEPT_DIAGNOSTICS if diagnostics),
        *((name, pa.int32()) for name in COUNTS),
        ("error", pa.string()),
        ("versions", pa.string()),
        ("settings", pa.string()),
    ]
    for name in columns.keep:
        if name in dict(fields):
            raise ValueError(f"--keep-columns {name}: the output has a column of that name; rename the input's")
        fields.append((name, source.field(name).type))
    for name, kind in fields:
        if not (_is_storable(kind) and _is_json(kind)):
            raise ValueError(
                f"column {name} is of type {kind!s:.200}; only text, numbers, and lists and mappings of them go, "
                "neither mappings of nothing nor deep nesting"
            )
    return pa.schema(fields)


def _prompt_type(source: pa.Schema, name: str) -> pa.DataType:
    kind = source.field(name).type
    lists, texts = (pa.types.is_list, pa.types.is_large_list), (pa.types.is_string, pa.types.is_large_string)
    if not any(check(kind) for check in (*lists, *texts, pa.types.is_null)):
        raise ValueError(
            f"column {name} is of type {kind!s:.200}; prompts are text, lists of chat messages or token ids"
        )
    return kind


def output_columns(output: GenerationOutput, row: Row, columns: Columns, *, diagnostics: bool) -> dict[str, Any]:
    """What a row of the output holds of a sequence, which was drawn for a row of the input."""
    t_prompt = {"t_prompt": columns.t_prompt_of(row)} if columns.shows_t_prompt else {}
    return {
        "prompt": output.prompt,
        **t_prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "generated_text": output.generated_text,
        "finish_reason": output.finish_reason,
        **output.record.stored_columns(),
        **{name: output.record.diagnostics.get(name, []) for name in KEPT_DIAGNOSTICS if diagnostics},
        "error": columns.t_prompt_error(row) or output.error,
    }


def _is_storable(kind: pa.DataType) -> bool:
    """Whether a Parquet file can have such a column, and be read."""
    file = io.BytesIO()
    try:
        pq.write_table(pa.schema([("column", kind)]).empty_table(), file)
        pq.ParquetFile(file)
    except (pa.ArrowException, OSError):
        return False
    return True


def _is_json(kind: pa.DataType) -> bool:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _is_json(kind.value_type)
    if pa.types.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    plain = (
        pa.types.is_null,
        pa.types.is_boolean,
        pa.types.is_integer,
        pa.types.is_floating,
        pa.types.is_string,
        pa.types.is_large_string,
    )
    return any(check(kind) for check in plain)
