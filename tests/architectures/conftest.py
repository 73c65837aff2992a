"""Examples, and a way to keep float64 models in float64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from architectures.layouts import some_examples
from fisher_oracle import float64_throughout
from torch import Tensor


@pytest.fixture(scope="module")
def examples() -> list[Tensor]:
    return some_examples()


@pytest.fixture
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield
