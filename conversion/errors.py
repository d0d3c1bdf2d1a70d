"""Kinds of conversion error that a caller tells apart."""

from megatron_ads.errors import ConversionError


class DamagedCheckpointError(ConversionError):
    """A checkpoint's files contradict each other or themselves: truncated, incomplete, stale index, wrong shape."""
