"""What all tests share: one thread, and where the real data lies."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("coterie", deadline=None)  # machines are shared: slow is no failure
settings.load_profile("coterie")
BESIDE = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets: COTERIE_DATA, or ../shared/data beside the repository."""
    folder = Path(os.environ.get("COTERIE_DATA") or BESIDE)
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} is not there; set COTERIE_DATA to a folder of data sets")
    return folder
