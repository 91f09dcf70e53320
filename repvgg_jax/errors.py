"""Errors that a user can cause. Commands print them as one line on stderr and exit with status 2."""


class RepVGGError(Exception):
    """Base of every error that bad input can cause; its text is one clear sentence."""


class UnknownModelError(RepVGGError, ValueError):
    """A model name that is not in the table of published variants."""


class FusionError(RepVGGError, ValueError):
    """A parameter tree that cannot be re-parameterised: already fused, or without running statistics."""


class WeightsError(RepVGGError):
    """A weight file that cannot be read, or that does not fit the model asked for."""


class QuantizationError(RepVGGError, ValueError):
    """A net that cannot be quantised, or calibration images that it cannot be quantised with."""


class ExportError(RepVGGError):
    """A net that cannot be written for another runtime: a library is missing, or the file computes something else."""


class DataError(RepVGGError):
    """A data set that cannot be found or read, or an image that is no image."""


class DataWarning(UserWarning):
    """An image that was left out because it cannot be read."""


class ConfigError(RepVGGError, ValueError):
    """Training options that contradict each other or the machine."""
