"""Virtual environments for the rivals, made from the pinned files in requirements/."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
VENVS = HERE / ".venvs"


def python_of(rival: str) -> Path:
    """The interpreter of a rival's environment, which is made first where it is missing or out of date.

    Raises SystemExit that says what failed, with pip's last lines, and how to go on without this rival.
    """
    requirements, folder = HERE / "requirements" / f"{rival}.txt", VENVS / rival
    wanted = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    stamp, python = folder / ".made", folder / "bin" / "python"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making {folder} from {requirements.name} ...", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
    torch = next(line for line in requirements.read_text().splitlines() if line.startswith("torch=="))
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, torch],  # first and alone: what it brings must be the build that pip is set up to find
        [*pip, "-r", str(requirements)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
            raise SystemExit(
                f"cannot make the environment of {rival}: {' '.join(command)} failed:\n{said}\n"
                f"Check the network and pip's configuration (for torch's CPU build: PIP_EXTRA_INDEX_URL="
                f"https://download.pytorch.org/whl/cpu), or leave {rival} out with --systems."
            )
    stamp.write_text(wanted)
    return python
