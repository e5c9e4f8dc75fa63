"""Package metadata. Exact versions are pinned in constraints.txt; ranges here say what the code is written against."""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "lightningrl/__init__.py").read_text("utf-8"), re.M).group(1)

# Without an exact version pip takes autogen's placeholder release.
AGENTS = ["langgraph", "langchain-openai", "openai", "openai-agents", "autogen-agentchat==0.7.5", "autogen-ext[openai]==0.7.5"]
RAY = ["ray>=2.50"]
NOTEBOOKS = ["ipykernel", "nbclient", "nbformat"]
TEST = [
    *AGENTS,
    *NOTEBOOKS,  # run by the tests
    *RAY,
    # The other implementation that weights are compared with, and what `transformers serve` needs to answer from them.
    "torch",
    "accelerate",
    "fastapi",
    "hypothesis",
    "mypy",
    "psutil",
    "pytest",
    "pytest-xdist",
    "ruff",
]

setup(
    name="lightningrl",
    version=VERSION,
    description="Reinforcement learning for LLM agents in JAX: credit assigners swapped by name, agents left as they are.",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["lightningrl", "lightningrl.*", "experiments", "experiments.*"]),
    install_requires=[
        "absl-py",
        "bm25s",
        "chex",
        "flax",
        "httptools",  # uvicorn parses requests with it
        "httpx",
        "jax>=0.10,<0.13",
        "jinja2",  # chat templates
        "matplotlib",
        "numpy",
        "optax",
        "orbax-checkpoint",
        "pydantic>=2",
        "safetensors",
        "starlette",
        "tensorboardX",  # writes event files without TensorFlow, torch or a protobuf newer than autogen allows
        "tokenizers",
        "tqdm",
        "transformers>=5",
        "uvicorn",
    ],
    extras_require={
        "agents": AGENTS,
        "test": TEST,
        "notebooks": [*NOTEBOOKS, *AGENTS],
        "ray": RAY,
        "gpu": ["jax[cuda12]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
    },
)
