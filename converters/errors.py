"""The errors of `converters`: what went wrong, and the exit code that `fieldvit` ends with.

ConversionError             10  (RuntimeError)  a model cannot be turned into an artifact, or the artifact is wrong
+-- UnsupportedOpError          (ValueError)    an operation that the target or our evaluator does not know
+-- RefusedModelError                           a converter does not take the model; another one may
+-- MissingEnvironmentError                     a tool that has an environment of its own is not installed
+-- ParityError             11                  an artifact differs too much from its reference
"""


class ConversionError(RuntimeError):
    """A model cannot be converted, or the artifact that came out is not what was asked for."""

    exit_code = 10


class UnsupportedOpError(ConversionError, ValueError):
    """An operation that the target or our evaluator does not know."""


class RefusedModelError(ConversionError):
    """A third-party converter does not take the model; another one may."""


class MissingEnvironmentError(ConversionError):
    """A tool that lives in an environment of its own is not installed; the message names the make target."""


class ParityError(ConversionError):
    """An artifact answers too differently from the model that it was made from."""

    exit_code = 11
