"""What can go wrong, by name. Every message says what was seen and ends with what to do."""

from __future__ import annotations


class LoraclrError(Exception):
    """The one base of all errors that a user of this package is meant to see."""


class FormatError(LoraclrError):
    """A file is not what it should be: unknown keys, wrong shapes, truncated, hostile."""


class MergeError(LoraclrError):
    """The adapters, the base or the method do not fit together."""


class NumericalError(MergeError):
    """A solve failed: NaN, not positive definite, or rank lost."""


class TrainError(LoraclrError):
    """A training cannot go on: it diverged, or its work folder is another training's."""


class PipelineError(LoraclrError):
    """The base pipeline cannot be loaded, or does not have what was asked of it."""


class UsageError(LoraclrError):
    """A value given by the user cannot be used: a prompt, a region, a size, a name."""


class WriteError(LoraclrError):
    """An output cannot be written: no space, no permission, or another run is writing it."""


class MergeWarning(UserWarning):
    """The merge works, but something about its inputs or its outcome deserves a look."""
