"""Arrays as vLLM sends them inside JSON: base64 of an .npy file."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np


def decoded_floats(encoded: Any, shape: tuple[int, int]) -> np.ndarray:
    """The array of floats of that shape that `encoded` holds; nothing in it is executed.

    Raises:
        ValueError: it holds something else.
    """
    try:
        array = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    except (TypeError, ValueError, EOFError) as error:
        raise ValueError(f"not base64 of an .npy file ({error})") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f" or array.shape != shape:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
        raise ValueError(f"{found} instead of floats {shape}")
    return array.astype(np.float64)
