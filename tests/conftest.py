"""What all tests share: one thread, and where the real data lies."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import databases

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


@pytest.fixture(scope="session")
def postgres():
    """The URL of a PostgreSQL server of the tests' own."""
    with databases.cluster() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request, tmp_path):
    """The URL of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/server/server.db"
    import psycopg

    url = request.getfixturevalue("postgres") + "/postgres"
    with psycopg.connect(url, autocommit=True) as connection:  # a new database is slow to make and to remove
        connection.execute("drop schema public cascade")
        connection.execute("create schema public")
    return url
