"""Interpret the Triton kernels where there is no GPU; this must happen before Triton is imported."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch loads: spinning threads starve busy machines

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and for very long on a busy machine


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA or ROCm device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory is NaN (the largest value in integer tensors), and operations without a fixed order raise."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_shards(tmp_path, monkeypatch):
    """A token cache of the test's own, and shards so small that tiny data has several."""
    from fastforget.matrix import plan

    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "TOKENS_PER_SHARD", (2048, 2**21))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Base, checkpoints, adapters and upstream examples on disk; read only."""
    from tiny_models import save_world

    return save_world(tmp_path_factory.mktemp("world"))


# For tests of the Fisher ----------------------------------------------------------------------------------------------


@pytest.fixture
def only_float64():
    """Norms and losses of float64 models are float32 in transformers: not in a test that uses this."""
    from fisher_oracle import float64_throughout

    with float64_throughout():
        yield


@pytest.fixture
def model():
    """A tiny Llama in float64, in eval mode, whose head is its embedding."""
    from architectures.families import build

    return build("Llama, tied", torch.float64).eval()


@pytest.fixture(scope="module")
def examples():
    """Four examples, unpadded."""
    from architectures.layouts import some_examples

    return some_examples()


@pytest.fixture
def batch(examples):
    """The four examples, padded on the right."""
    from architectures.layouts import padded

    return padded(examples, "right")
