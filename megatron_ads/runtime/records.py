"""Records that the ranks of a job send each other, as bytes in which nothing but plain values and records is read.

The ring's connections and the job's store are open to whoever reaches their ports; a pickle that is read freely would
run what it says.
"""

import io
import pickle
import sys
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

_MODULES = ("megatron_ads.runtime.", "megatron_ads.layout")


def to_bytes(record: object) -> bytes:
    """Return plain values and dataclasses or enumerations of ``runtime`` and ``layout`` as bytes."""
    return pickle.dumps(record)


def from_bytes(data: bytes) -> Any:
    """Return what ``to_bytes`` was given.

    Raises:
        pickle.UnpicklingError: If the bytes refer to anything else; nothing of it is called.
    """
    return _RecordUnpickler(io.BytesIO(data)).load()


class _RecordUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = getattr(sys.modules.get(module), name, None) if module.startswith(_MODULES) else None
        if isinstance(found, type) and found.__module__ == module and (is_dataclass(found) or issubclass(found, Enum)):
            return found
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is no record of a job")
