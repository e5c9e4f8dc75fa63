"""What a run was made of: enough to make it again."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "transformers",
    "tokenizers",
    "langgraph",
    "langchain-openai",
)


def manifest(settings: Mapping[str, Any], config: Mapping[str, Any], data_hash: str) -> dict[str, Any]:
    """Versions, commit, config and data hash, as JSON.

    Args:
      settings: those that decide what is computed; config: all of them.
    """
    return {
        "commit": commit(),
        "config": dict(config),
        "data_hash": data_hash,
        "devices": [str(device) for device in jax.devices()],
        "machine": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "settings": dict(settings),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
    }


def commit() -> str | None:
    """The commit of the code, with `+changes` where files differ from it; None outside a checkout."""
    here = Path(__file__).parent

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
