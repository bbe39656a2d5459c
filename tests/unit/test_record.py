"""The record's columns are declared once; what holds them elsewhere follows."""

from __future__ import annotations

from typing import get_args, get_origin, get_type_hints

import pytest

from dual_rollout.record import COLUMNS, COUNTS, FLOAT_COLUMNS, STORED_COLUMNS, SequenceRecord, _column


def test_columns_are_of_the_kind_that_their_types_say() -> None:
    hints = get_type_hints(SequenceRecord)
    entries = {name: get_args(hint)[0] for name, hint in hints.items() if get_origin(hint) is list}
    counts = tuple(name for name, hint in hints.items() if hint is int)
    assert [*hints] == [*COLUMNS, "diagnostics", *COUNTS] and (tuple(entries), counts) == (COLUMNS, COUNTS)
    assert [name for name, entry in entries.items() if entry is float] == [*FLOAT_COLUMNS][:-1]
    assert {name: entry for name, entry in entries.items() if name in STORED_COLUMNS} == {
        name: kind for name, kind in STORED_COLUMNS.items() if name in entries
    }


def test_a_column_that_neither_tensors_nor_shards_can_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="int, float or bool"):
        _column(str)
