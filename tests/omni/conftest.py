"""Fixtures: the small random checkpoints; and where the engine's processes find the CPU platform."""

import os
from pathlib import Path

import pytest
from install import HERE
from models import make_checkpoints

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # what is not in the checkpoint must not be fetched
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # or both stages share one core
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.fixture(scope="session")
def checkpoints() -> Path:
    """A folder with indextts2 and indextts2_5."""
    return make_checkpoints()
