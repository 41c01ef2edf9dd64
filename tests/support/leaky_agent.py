"""The timed agent with a leak: memory with every frame, and a descriptor with every twentieth.

python -m tests.support.leaky_agent MOMENTS ROOT
"""

import os
import sys

from bench import timed_agent

LEAK_BYTES = 2000
_kept: list[object] = []


def main() -> int:
    from device.app import Agent

    process = Agent._process

    def leaking(agent, model, frame) -> None:
        process(agent, model, frame)
        _kept.append(os.urandom(LEAK_BYTES))
        if len(_kept) % 20 == 0:
            _kept.append(open(os.devnull))  # noqa: SIM115

    Agent._process = leaking
    return timed_agent.main()


if __name__ == "__main__":
    sys.exit(main())
