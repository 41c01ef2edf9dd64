"""The errors of `device`: what went wrong, and the exit code a supervisor or script sees.

DeviceError                 1
+-- ConfigError             2   (ValueError)    a configuration value is missing, unknown or out of range
+-- ArtifactError           3   (ValueError)    a bundle, manifest or model file is unusable
|   +-- ChecksumError                           its bytes are not the bytes that were signed for
|   +-- BoardMismatchError                      it was built for other boards
|   +-- SchemaError                             its manifest has a schema that this version does not read
|   +-- NoVerdictError                          its self-test took too long or was killed, perhaps by a busy board
+-- MessageError            4   (ValueError)    an MQTT payload or topic breaks the contract
+-- UpdateRefusedError      5   (RuntimeError)  an update was refused; the running model was not touched
+-- EngineError             6   (RuntimeError)  the interpreter refused a model or an input
|   +-- RuntimeMismatchError  25                the runtime installed here lacks what the model needs, or computes it wrongly
+-- LearningError           7   (ValueError)    labels or features cannot be learned
|   +-- GuardError                              a proposed update would do harm and was not committed
+-- BrokerError             8   (ConnectionError)  the MQTT broker cannot be reached
+-- FrameError              9   (ValueError)    a frame cannot be read or has the wrong shape
+-- AgentBusyError          10  (RuntimeError)  another process holds this data directory
+-- InterruptedTestError    11  (RuntimeError)  a self-test was ended from outside; it says nothing about the model
+-- EnrolmentError          24  (RuntimeError)  this board's certificate could not be got, renewed or read
"""

BAD_FRAME_REASONS = ("unreadable", "too-large", "shape", "source")
"""Damaged or of an unknown kind; over a limit; not what the model takes; not even a source to read it from."""


def one_line(error: Exception) -> str:
    """An error's text as one line that any encoder takes."""
    return " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode()


class DeviceError(Exception):
    """Base of every error that `device` raises on purpose."""

    exit_code = 1


class ConfigError(DeviceError, ValueError):
    """A configuration value is missing, unknown or out of range."""

    exit_code = 2


class ArtifactError(DeviceError, ValueError):
    """A bundle, its manifest or a model file is unusable."""

    exit_code = 3


class ChecksumError(ArtifactError):
    """A file's SHA-256 differs from the one the manifest promises."""

    def __init__(self, name: str, *, expected: str, actual: str) -> None:
        super().__init__(
            f"{name}: sha256 {actual[:12]}... differs from the manifest's {expected[:12]}...; copy the bundle again"
        )
        self.name = name
        self.expected = expected
        self.actual = actual


class BoardMismatchError(ArtifactError):
    """A bundle was built for other boards than this one."""


class SchemaError(ArtifactError):
    """A manifest of a schema that this version of the agent does not read."""


class NoVerdictError(ArtifactError):
    """A self-test took too long or was killed: the model's fault, or that of a board that was busy just then."""


class MessageError(DeviceError, ValueError):
    """An MQTT payload or topic breaks the contract."""

    exit_code = 4


class UpdateRefusedError(DeviceError, RuntimeError):
    """An update was refused before it touched the running model; `reason` is a short stable word."""

    exit_code = 5

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class EngineError(DeviceError, RuntimeError):
    """The interpreter refused a model or an input."""

    exit_code = 6


class RuntimeMismatchError(EngineError):
    """The runtime that is installed here lacks an operation of the model, or is known to compute it wrongly.

    The message names the runtime with its version: with another one the model may be tried again.
    """

    exit_code = 25


class LearningError(DeviceError, ValueError):
    """Labels or features cannot be learned."""

    exit_code = 7


class GuardError(LearningError):
    """A proposed update would do harm; nothing was committed."""


class BrokerError(DeviceError, ConnectionError):
    """The MQTT broker cannot be reached."""

    exit_code = 8


class FrameError(DeviceError, ValueError):
    """A frame cannot be read or has the wrong shape; `reason` is one of `BAD_FRAME_REASONS`, by which it is counted."""

    exit_code = 9

    def __init__(self, message: str, *, reason: str = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class AgentBusyError(DeviceError, RuntimeError):
    """Another process holds this data directory."""

    exit_code = 10


class InterruptedTestError(DeviceError, RuntimeError):
    """A self-test was ended from outside before it had an answer; this says nothing about the model."""

    exit_code = 11


class EnrolmentError(DeviceError, RuntimeError):
    """This board's certificate could not be got, renewed or read."""

    exit_code = 24
