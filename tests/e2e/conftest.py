"""What the end-to-end tests need of the machine, and who listens."""

import shutil

import pytest
from hearing import Listener


def pytest_sessionstart():
    """Stop where ffmpeg is missing: nothing of the task could be shown."""
    if missing := [name for name in ("ffmpeg", "ffprobe") if not shutil.which(name)]:
        pytest.exit(f"{' and '.join(missing)} missing; type: sudo apt-get install ffmpeg", returncode=3)


@pytest.fixture(scope="session")
def listener():
    """whisper-base."""
    return Listener()
