"""Everything in this folder needs a CUDA device: `python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest
import torch

from tests.integration.conftest import tiny_models, tiny_pair

__all__ = ["tiny_models", "tiny_pair"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session", autouse=True)
def _a_device() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
