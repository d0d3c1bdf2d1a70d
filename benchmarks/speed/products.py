"""The matrix products and attention kernels of a step, noted while it runs once, and run again without the rest."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "_grouped_mm", "scaled_dot_product")


@dataclass(slots=True)
class Products:
    """Calls of torch's operations; being called, it makes them all again, in the same order and on as much memory."""

    calls: list[tuple[Any, Any, Any]] = field(default_factory=list)

    def __call__(self) -> None:
        with torch.no_grad():
            for operation, arguments, named in self.calls:
                operation(*arguments, **named)

    def counts(self) -> dict[str, int]:
        """Return how often each operation is called."""
        return dict(Counter(str(operation) for operation, *_ in self.calls))


class _Noting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found = Products()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_product(operation):
            self.found.calls.append((operation, tree_map(_kept, args), tree_map(_kept, kwargs)))
        return operation(*args, **kwargs)


def _is_product(operation: Any) -> bool:
    name = operation.overloadpacket.__name__
    return name.removesuffix("_") in _PRODUCTS or any(part in name for part in _PRODUCTS[-2:])


def _kept(value: Any) -> Any:
    """Return a tensor of its own with the same values and strides, which later work does not change."""
    if not isinstance(value, torch.Tensor):
        return value
    copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    return copy.copy_(value.detach())


def products_of(step: Callable[[], object]) -> Products:
    """Run ``step`` once and return the products among what it does, backward pass and update included."""
    with _Noting() as noting:
        step()
    return noting.found
