"""Lets the tests import the scripts of the repository's top folder, wherever pytest is started."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


@pytest.fixture(scope="session")
def world():
    """The built-in world, rendered once."""
    import data
    return data.World()
