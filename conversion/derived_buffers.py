"""Small tensors, such as rotary frequencies, that some checkpoints store although the config determines them.

No Megatron model holds them. They are carried along as they are, so that an export has the keys its source had.
"""

import base64
import math
from dataclasses import dataclass

import torch

from conversion.atomic_file import tensor_bytes
from conversion.safetensors_file import CODES, DTYPES, HeaderEntry, StoredTensor


@dataclass(frozen=True, slots=True)
class DerivedBuffer:
    """One such tensor, bytes included."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, stored: StoredTensor) -> "DerivedBuffer":
        """Read one from a file."""
        return cls(stored.dtype, stored.shape, bytes(tensor_bytes(stored.read())))

    @classmethod
    def parse(cls, entry: dict[str, str | list[int]]) -> "DerivedBuffer":
        """Read one from the form that :meth:`as_json` gives.

        Raises:
            LookupError, TypeError, ValueError: If ``entry`` is of another form.
        """
        dtype, shape = DTYPES[str(entry["dtype"])], tuple(int(extent) for extent in entry["shape"])
        data = base64.b64decode(str(entry["base64"]))
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{len(data)} bytes cannot be {dtype} of shape {shape}")
        return cls(dtype, shape, data)

    def as_json(self) -> dict[str, str | list[int]]:
        """Return a form for a manifest."""
        return {
            "dtype": CODES[self.dtype],
            "shape": list(self.shape),
            "base64": base64.b64encode(self.data).decode(),
        }

    def entry(self, name: str) -> HeaderEntry:
        """Return the header entry it is written under."""
        return HeaderEntry(name, self.dtype, self.shape)
