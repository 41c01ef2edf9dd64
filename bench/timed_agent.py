"""The agent itself, as `fieldvit-device run` starts it, with a note of when each frame began and ended.

python -m bench.timed_agent MOMENTS ROOT

What notes them is loaded when the agent has its model: before, it would load NumPy, and the agent would start in another
order.
"""

import sys
import time
from pathlib import Path

from device import cli
from device.opening import Opening


def main() -> int:
    finish = Opening.finish

    def note_and_finish(opening: Opening) -> None:
        if not hasattr(note_frames, "moments"):
            note_frames(Path(sys.argv[1]))
        finish(opening)

    Opening.finish = note_and_finish
    return cli.main(["run", "--root", sys.argv[2]])


def note_frames(path: Path) -> None:
    from bench.moments import Moments
    from device.serving import Model

    moments, infer = Moments(path), Model.infer

    def timed(model, pixels):
        began = time.monotonic()
        answer = infer(model, pixels)
        moments.add(began, time.monotonic())
        return answer

    note_frames.moments = moments
    Model.infer = timed


if __name__ == "__main__":
    sys.exit(main())
