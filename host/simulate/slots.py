"""The two slots of a simulated board and what came of each bundle, by the rules of `device/slots.py`; nothing is on a disk."""

from dataclasses import dataclass, replace

from device.contract.errors import AgentBusyError, ArtifactError
from host.simulate.release import Release

NAMES = ("a", "b")
SHOWN = ("slot", "state", "name", "version", "release", "precision")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """What is in a slot, and its state: empty, staged, testing, confirmed or rejected."""

    slot: str
    state: str = "empty"
    release: Release | None = None
    precision: str = ""

    def facts(self) -> dict[str, object]:
        """Slot and model, as an event of it says."""
        release = self.release
        named = {"name": release.name, "version": release.version, "release": release.release} if release else {}
        return {"slot": self.slot, **named, **({"precision": self.precision} if self.precision else {})}


class Slots:
    """A board that was flashed with `release` and has confirmed it."""

    def __init__(self, release: Release, precision: str) -> None:
        self._slots = {name: Slot(slot=name) for name in NAMES}
        self._put(Slot(slot="a", state="confirmed", release=release, precision=precision))
        self.serving = self._slots["a"]
        self._rejected: dict[str, str] = {}  # bundle -> reason

    @property
    def is_testing(self) -> bool:
        return self.serving.state == "testing"

    def table(self) -> dict[str, object]:
        """What is served, as replies show it."""
        return dict.fromkeys(SHOWN) | self.serving.facts() | {"state": self.serving.state}

    def rejection(self, bundle: str) -> str:
        """Why this bundle (by SHA-256) was rejected here; "" when it was not."""
        return self._rejected.get(bundle, "")

    def stage(self, release: Release) -> Slot:
        """Fill the spare slot; AgentBusyError while a model is on probation."""
        if self.is_testing:
            raise AgentBusyError(
                f"slot {self.serving.slot} is still in testing; let the agent confirm it, or reject it with 'fieldvit-device rollback'"
            )
        return self._put(Slot(slot="b" if self.serving.slot == "a" else "a", state="staged", release=release))

    def begin_testing(self, slot: Slot, precision: str) -> Slot:
        """Serve a staged slot on probation."""
        self.serving = self._put(replace(slot, state="testing", precision=precision))
        return self.serving

    def confirm(self) -> Slot:
        """End a probation well."""
        self.serving = self._put(replace(self.serving, state="confirmed"))
        assert self.serving.release is not None
        self._rejected.pop(self.serving.release.sha256, None)
        return self.serving

    def discard_staged(self) -> None:
        """Empty a slot whose self-test was interrupted, without a verdict."""
        for slot in list(self._slots.values()):
            if slot.state == "staged":
                self._put(Slot(slot=slot.slot))

    def reject(self, slot: Slot, reason: str) -> Slot:
        """Take a slot out of service for good; if it served, the one before serves again."""
        assert slot.release is not None
        self._rejected[slot.release.sha256] = reason
        rejected = self._put(replace(slot, state="rejected"))
        if slot.slot == self.serving.slot:
            self.serving = self.other()
        return rejected

    def other(self) -> Slot:
        """The confirmed slot beside the one that serves; ArtifactError when there is none."""
        found = self._slots["b" if self.serving.slot == "a" else "a"]
        if found.state != "confirmed":
            raise ArtifactError(
                "there is no earlier confirmed model to go back to; install one with 'fieldvit-device update'"
            )
        return found

    def _put(self, slot: Slot) -> Slot:
        self._slots[slot.slot] = slot
        return slot
