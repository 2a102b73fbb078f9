"""What every test process starts from: one thread, nothing fetched, properties that repeat under CI."""

import os
import sys

# Before numpy and torch are imported: tiny models are fastest on one thread, and bit-identity is promised for one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that needs the network is wrong; this makes it fail at once instead of waiting.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["FLWR_TELEMETRY_ENABLED"] = "0"

import pytest
from hypothesis import settings

# No deadline: the machines are shared, and a slow example is no defect. CI repeats the same examples every time.
settings.register_profile("fedmini", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("fedmini")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """A run in this process may have asked for more: the next test starts from one again."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
