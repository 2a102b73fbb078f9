"""The coordinator with injected randomness: what a test's supervisor starts in the place of the real one."""

import sys

from fedmini.deployment import coordinator
from fedmini.randomness import Randomness
from tests.deployment import seeded

if __name__ == "__main__":
    sys.exit(coordinator.run_process(sys.argv[1:], Randomness(seeded.streams, is_seeded=True)))
