"""Fixtures for all tests: tiny checkpoints, built once a session."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

# Before torch is imported: tiny models run slower on many threads, and no test may reach for the Hub.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
# A job in a shell's background ignores Ctrl-C, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402 - may import torch through a plugin


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a builder's name (see `tiny.BUILDERS`) to its folder; treat the folder as read-only."""
    from tests import tiny

    built: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in built:
            built[name] = tiny.BUILDERS[name](tmp_path_factory.mktemp(name) / name)
        return built[name]

    return folder


@pytest.fixture(scope="session")
def tiny_causal_lm(tiny_folder: Callable[[str], Path]) -> Path:
    """The tiny Qwen3 as a plain causal LM."""
    return tiny_folder("causal_lm")


@pytest.fixture(scope="session")
def tiny_stack(tiny_folder: Callable[[str], Path]) -> Path:
    """The tiny Qwen3 as a sentence-transformers stack, zerank-2's layout."""
    return tiny_folder("sentence_transformers_stack")


@pytest.fixture(scope="session")
def tiny_sequence_classification(tiny_folder: Callable[[str], Path]) -> Path:
    """The tiny Qwen3 as a sequence classifier whose score row carries the 1/5, vLLM's layout."""
    return tiny_folder("sequence_classification")


@pytest.fixture(scope="session")
def tiny_lora(tiny_folder: Callable[[str], Path]) -> Path:
    """A LoRA folder; its base and the equal merged causal LM lie beside it as `base` and `merged`."""
    return tiny_folder("lora")
