import os
from pathlib import Path

import numpy as np
import pytest
import torch

from coterie.data import Examples

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets, or a skip."""
    folder = Path(os.environ.get("COTERIE_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (folder / "mnist").is_dir():
        pytest.skip("no real data: set COTERIE_DATA to the folder that has mnist/")
    return folder


@pytest.fixture(scope="session")
def labelled() -> Examples:
    """3,000 rows of 10 labels of unequal frequency, with three key columns."""
    draw = np.random.default_rng(0)
    n = 3000
    y = draw.choice(10, size=n, p=np.arange(1, 11) / 55)
    keys = {
        "site": draw.choice(["north", "south/east", "a b", "?"], size=n, p=[0.6, 0.3, 0.095, 0.005]),
        "patient": draw.integers(0, 400, size=n),
        "age": draw.integers(18, 90, size=n),
    }
    return Examples(
        torch.from_numpy(draw.standard_normal((n, 5)).astype(np.float32)), torch.from_numpy(y), keys
    )
