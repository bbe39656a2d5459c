"""Arrays inside JSON: what they hold is floats of the shape that was asked for, and nothing else is ever loaded."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import numpy as np
import pytest

from dual_rollout.exceptions import EngineProtocolError
from dual_rollout.servers import HttpTransport, VLLMEngine
from dual_rollout.servers.vllm_named_rows import requests_for, values_of, width
from dual_rollout.servers.vllm_npy import decoded_floats


def encoded(save: Any, *arrays: Any, **options: Any) -> str:
    buffer = io.BytesIO()
    save(buffer, *arrays, **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_floats_come_back() -> None:
    array = np.log(np.arange(1, 7, dtype=np.float32)).reshape(2, 3)
    decoded = decoded_floats(encoded(np.save, array), (2, 3))
    assert decoded.dtype == np.float64
    np.testing.assert_array_equal(decoded, array)


def with_header(header: str, length: int | None = None) -> str:
    """A file of 48 bytes that says of itself what `header` says."""
    size = (len(header) + 1 if length is None else length).to_bytes(2, "little")
    return base64.b64encode(b"\x93NUMPY\x01\x00" + size + header.encode() + b"\n" + bytes(48)).decode()


def test_what_numpy_writes_for_transposed_arrays_is_read() -> None:
    array = np.arange(6, dtype=">f4").reshape(3, 2).T
    np.testing.assert_array_equal(decoded_floats(encoded(np.save, array), (2, 3)), array)
    assert decoded_floats(with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }"), (2, 3)).sum() == 0


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
        base64.b64encode(b"PK\x03\x04 no archive").decode(),
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000, 1000000000), }"),
        with_header("{'descr': '<f8', 'fortran_order': False, 'shape': (2, 3), }", length=60000),
        with_header("(" * 2000),
        with_header("{'descr': '"),
        encoded(np.save, np.array([[Exploding()] * 3] * 2, dtype=object), allow_pickle=True),
    ],
    ids=[
        "null",
        "number",
        "empty",
        "text",
        "bytes",
        "cut off",
        "shape",
        "integers",
        "archive",
        "no archive",
        "absurd",
        "long header",
        "nested",
        "open",
        "pickle",
    ],
)
def test_anything_else_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match=r"not base64|instead of floats"):
        decoded_floats(value, (2, 3))


class FewRows(HttpTransport):
    """A server that gives named rows along a text only for what is not cached; `uncached` of them."""

    def __init__(self, uncached: int | None, whole: int) -> None:
        super().__init__("http://few.rows")
        self.rows = {False: uncached, True: whole}
        self.asked: list[bool] = []

    async def get(self, path: str) -> Any:
        return {"data": [{"id": "m"}]}

    async def get_text(self, path: str) -> str:
        return ""

    async def post(self, path: str, payload: Any = None, **_: Any) -> Any:
        sampling = payload["sampling_params"]
        self.asked.append(skip := sampling["skip_reading_prefix_cache"])
        count, columns = self.rows[skip], width(sampling["prompt_logprob_token_ids"])
        rows = np.full((count or 0, columns), -float(1 + skip), dtype=np.float32)
        rows = None if count is None else encoded(np.save, rows)
        return {"prompt_token_id_logprobs": rows}


@pytest.mark.parametrize("uncached", [None, 0, 2])
def test_named_rows_that_the_cache_holds_are_asked_for_without_it(uncached: int | None) -> None:
    transport = FewRows(uncached, whole=3)
    rows = asyncio.run(VLLMEngine(transport)._requests.named_rows([1, 2, 3, 4, 5], 3, [[7, 9], [], [7]]))
    assert transport.asked == [False, True]
    assert rows.tolist() == [[-2.0, -2.0]] * 3


def test_named_rows_that_are_not_there_at_all_are_a_fault() -> None:
    with pytest.raises(EngineProtocolError, match=r"\(2, 2\) floats in 16 bytes instead of floats \(3, 2\)"):
        asyncio.run(VLLMEngine(FewRows(2, whole=2))._requests.named_rows([1, 2, 3, 4, 5], 3, [[7, 9], [], [7]]))


@pytest.mark.parametrize("form", ["per row", "shared"])
@pytest.mark.parametrize("limit", [None, 1, 2, 3])
def test_either_form_of_naming_gives_each_row_its_own(form: Any, limit: int | None) -> None:
    names = [[], [7, 3], [9, 1, 3, 8], [5], []]
    table = np.arange(50.0).reshape(5, 10)

    def answer(request: Any) -> np.ndarray:
        """What vLLM says: -inf where a row is padded."""
        rows = request if form == "per row" else [request] * len(names)
        values = np.full((len(names), width(request)), -np.inf)
        for value, scores, ids in zip(values, table, rows, strict=True):
            value[: len(ids)] = scores[ids]
        return values

    requests = requests_for(form, names, limit)
    assert limit is None or max(map(width, requests)) <= limit
    rows = values_of(form, names, list(map(answer, requests)))
    assert [row.tolist() for row in rows] == [scores[ids].tolist() for scores, ids in zip(table, names, strict=True)]
