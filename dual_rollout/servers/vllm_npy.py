"""Arrays as vLLM sends them inside JSON: base64 of an .npy file."""

from __future__ import annotations

import base64
import re
from typing import Any

import numpy as np

_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER = re.compile(
    r"\{'descr': '([<>]f[248])', 'fortran_order': (True|False), 'shape': \((\d{1,9}), (\d{1,9})\), \} *\n"
)


def decoded_floats(encoded: Any, shape: tuple[int, int]) -> np.ndarray:
    """The array of floats of that shape that `encoded` holds.

    Only what NumPy writes for such an array is read, and memory is taken for no more than was sent.

    Raises:
        ValueError: it holds something else.
    """
    try:
        content = base64.b64decode(encoded, validate=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not base64 of an .npy file ({error})") from error
    start = len(_MAGIC) + 2
    end = start + int.from_bytes(content[len(_MAGIC) : start], "little")
    header = _HEADER.fullmatch(content[start:end].decode("latin-1"))
    if not content.startswith(_MAGIC) or header is None:
        raise ValueError(f"not base64 of an .npy file of floats, two-dimensional ({content[:end][:100]!r})")
    descr, fortran_order, *found = header.groups()
    size = shape[0] * shape[1] * int(descr[2])
    if tuple(map(int, found)) != shape or len(content) - end != size:
        raise ValueError(f"({', '.join(found)}) floats in {len(content) - end} bytes instead of floats {shape}")
    order: Any = "F" if fortran_order == "True" else "C"
    return np.frombuffer(content, dtype=descr, offset=end).reshape(shape, order=order).astype(np.float64)
