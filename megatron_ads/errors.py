"""Errors a user can cause. Each message says what is wrong, with the values, then what to do."""


class MegatronAdsError(Exception):
    """Base of every error this project raises on purpose; command lines catch only this."""


class ConfigError(MegatronAdsError, ValueError):
    """A setting is impossible, unknown, or contradicts another one."""


class ConversionError(MegatronAdsError, ValueError):
    """A checkpoint does not match the model it is being converted for."""


class CheckpointError(MegatronAdsError, RuntimeError):
    """A training checkpoint is missing, incomplete, damaged, or of another job."""


class DataError(MegatronAdsError, ValueError):
    """A row or a data file cannot be used; the message names the file and the row."""


class TopologyError(MegatronAdsError, RuntimeError):
    """The ranks of a job disagree about what they are about to do; the message names the odd one."""
