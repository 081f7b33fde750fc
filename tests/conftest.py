"""Lets the tests import the scripts of the repository's top folder, wherever pytest is started."""
import os
import sys
from pathlib import Path

# Small networks gain nothing from a second thread, and beside another process they lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def world():
    """The built-in world, rendered once."""
    import data
    return data.World()
