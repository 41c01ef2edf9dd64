"""Which third-party code this process has loaded: a board runs no training framework, and can prove it."""

import sys

_OURS = {"device", "firmware_configs"}
FORBIDDEN = frozenset({"torch", "tensorflow", "host", "converters"})


def third_party_modules() -> list[str]:
    """Top-level packages loaded that are neither the standard library nor this agent."""
    packages = {name.partition(".")[0] for name in tuple(sys.modules)}
    return sorted(name for name in packages - sys.stdlib_module_names - _OURS if not name.startswith("_"))


def forbidden_modules() -> list[str]:
    """Those that must never be loaded on a board."""
    return sorted(FORBIDDEN.intersection(third_party_modules()))
