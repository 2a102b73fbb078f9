"""The coordinator with injected randomness: what a test's supervisor starts in the place of the real one."""

import gc
import sys

from fedmini.deployment import coordinator
from fedmini.randomness import Randomness
from tests.deployment import seeded

if __name__ == "__main__":
    status = coordinator.run_process(sys.argv[1:], Randomness(seeded.streams, is_seeded=True))
    gc.freeze()  # as tests/deployment/device_process.py does
    sys.exit(status)
