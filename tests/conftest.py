"""Settings of every test: CPU, no network beyond loopback, no randomness that differs from run to run."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Any

import hypothesis
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("repeatable")

_connect = socket.socket.connect


def _connect_to_loopback(self: socket.socket, address: Any, /) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise AssertionError(f"a test tried to reach {host}; tests use loopback only")
    _connect(self, address)


socket.socket.connect = _connect_to_loopback  # type: ignore[assignment, method-assign]

LONGEST = ("test_resume.py", "test_fit.py", "test_train.py", "test_evidence_in_the_loop.py", "test_notebooks.py")  # a minute or more each


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: a file stays in one process, and at the end the others would wait for it."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
