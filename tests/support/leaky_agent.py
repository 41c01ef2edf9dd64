"""The timed agent with a leak: memory with every frame, and a descriptor with every four-hundredth.

python -m tests.support.leaky_agent MOMENTS ROOT
"""

import os
import sys

from bench import timed_agent

LEAK_BYTES = 2000
MAX_DESCRIPTORS = 800
"""`select`, with which the agent waits for its broker, takes descriptors up to 1024."""
_kept: list[bytes] = []
_open: list[object] = []


def main() -> int:
    from device.app import Agent

    account = Agent._account

    def leaking(agent, done) -> None:
        account(agent, done)
        _kept.append(os.urandom(LEAK_BYTES))
        if len(_kept) % 400 == 0 and len(_open) < MAX_DESCRIPTORS:
            _open.append(open(os.devnull))  # noqa: SIM115

    Agent._account = leaking
    return timed_agent.main()


if __name__ == "__main__":
    sys.exit(main())
