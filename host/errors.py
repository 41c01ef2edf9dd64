"""The errors of `host`: what went wrong, and the exit code a script sees.

HostError               1
+-- RecipeError         2   (ValueError)    a recipe or an option is missing, unknown or out of range
+-- DataError           12  (ValueError)    a data set cannot be found or read
+-- ModelError          13  (ValueError)    a model name or its weights do not fit
+-- TrainingError       14  (RuntimeError)  training went wrong, for example a loss that is not finite
+-- FleetError          15  (RuntimeError)  keys, the update repository, flashing or a board's answer
+-- MonitorError        16  (RuntimeError)  broker, store or page cannot start
+-- ExportError         17  (ValueError)    an artifact may not be shipped: too far from float, or over a board's budget
    +-- QuickstartError     18  (RuntimeError)  the quickstart ran, but missed what it promises
+-- BenchError          19  (RuntimeError)  a file cannot be measured
"""


class HostError(Exception):
    """Base of every error that `host` raises on purpose."""

    exit_code = 1


class RecipeError(HostError, ValueError):
    """A recipe or an option is missing, unknown or out of range."""

    exit_code = 2


class DataError(HostError, ValueError):
    """A data set cannot be found or read."""

    exit_code = 12


class ModelError(HostError, ValueError):
    """A model name or its weights do not fit."""

    exit_code = 13


class TrainingError(HostError, RuntimeError):
    """Training went wrong, for example a loss that is not finite."""

    exit_code = 14


class FleetError(HostError, RuntimeError):
    """Keys, the update repository, flashing, or a board's answer."""

    exit_code = 15


class MonitorError(HostError, RuntimeError):
    """Broker, store or page cannot start."""

    exit_code = 16


class ExportError(HostError, ValueError):
    """An artifact may not be shipped: too far from the float model, or over a board's budget."""

    exit_code = 17


class QuickstartError(HostError, RuntimeError):
    """The quickstart ran to its end, but missed what it promises."""

    exit_code = 18


class BenchError(HostError, RuntimeError):
    """A file cannot be measured: it is missing, its runtime is, or it kills the process that runs it."""

    exit_code = 19
