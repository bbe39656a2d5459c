"""Arrays inside JSON: what they hold is floats of the shape that was asked for, and nothing else is ever loaded."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest

from dual_rollout.engines.npy import decoded_floats


def encoded(save: Any, *arrays: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    save(buffer, *arrays, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_floats_come_back() -> None:
    array = np.log(np.arange(1, 7, dtype=np.float32)).reshape(2, 3)
    decoded = decoded_floats(encoded(np.save, array), (2, 3))
    assert decoded.dtype == np.float64
    np.testing.assert_array_equal(decoded, array)


class Exploding:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize(
    "value",
    [
        None,
        7,
        "",
        "not base64!",
        base64.b64encode(b"not an array").decode(),
        encoded(np.save, np.zeros((2, 3)))[:-40],
        encoded(np.save, np.zeros((3, 2))),
        encoded(np.save, np.zeros((2, 3), dtype=np.int64)),
        encoded(np.savez, np.zeros((2, 3))),
        encoded(np.save, np.array([[Exploding()] * 3] * 2, dtype=object), allow_pickle=True),
    ],
    ids=["null", "number", "empty", "text", "bytes", "cut off", "shape", "integers", "archive", "pickle"],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not base64|instead of floats"):
        decoded_floats(value, (2, 3))
