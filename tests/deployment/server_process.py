"""`fedmini server start` with the seeded coordinator: `python -m tests.deployment.server_process DIR RUN`."""

import sys
from pathlib import Path

from fedmini.deployment import supervisor
from fedmini.deployment.supervisor import Commands

if __name__ == "__main__":
    seeded = Commands(coordinator=(sys.executable, "-m", "tests.deployment.seeded_coordinator"))
    sys.exit(supervisor.start(Path(sys.argv[1]), sys.argv[2], "json", insecure=False, commands=seeded))
