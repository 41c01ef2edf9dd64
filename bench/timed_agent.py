"""The agent itself, as `fieldvit-device run` starts it, with a note of when each frame began and ended.

python -m bench.timed_agent MOMENTS ROOT
"""

import sys
import time
from pathlib import Path

from bench.moments import Moments
from device import cli


def main() -> int:
    from device.app import Agent  # as the command line does: after it has read its arguments

    moments, process = Moments(Path(sys.argv[1])), Agent._process

    def timed(agent, model, frame) -> None:
        began = time.monotonic()
        process(agent, model, frame)
        moments.add(began, time.monotonic())

    Agent._process = timed
    return cli.main(["run", "--root", sys.argv[2]])


if __name__ == "__main__":
    sys.exit(main())
