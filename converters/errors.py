"""The errors of `converters`: what went wrong, and the exit code that `fieldvit` ends with.

ConversionError             10  (RuntimeError)  a model cannot be turned into an artifact, or the artifact is wrong
+-- UnsupportedOpError          (ValueError)    an operation that the target or our evaluator does not know
+-- ParityError             11                  an artifact differs too much from its reference
"""


class ConversionError(RuntimeError):
    """A model cannot be converted, or the artifact that came out is not what was asked for."""

    exit_code = 10


class UnsupportedOpError(ConversionError, ValueError):
    """An operation that the target or our evaluator does not know."""


class ParityError(ConversionError):
    """An artifact answers too differently from the model that it was made from."""

    exit_code = 11
