"""Find the first layer at which two passes over the same tokens depart."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from parity_tests.tolerances import LAYER


@dataclass(frozen=True, slots=True)
class Departure:
    """A layer whose output differs although that of the layer before it does not."""

    layer: int
    difference: float
    """Largest |difference| of its output over the output's root mean square."""
    row: int
    position: int
    """Where in the tokens the difference is largest."""

    def __str__(self) -> str:
        return (
            f"layer {self.layer} departs first: its output is off by {self.difference:.1e} of its size, most at "
            f"position {self.position} of row {self.row}; the layers before it agree"
        )


def first_departure(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Departure | None:
    """Compare the outputs (B, S, C) of all layers; return the first beyond the tolerance, None if none is."""
    for layer, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        difference_BS = (a - b).abs().amax(dim=-1) / b.pow(2).mean().sqrt()
        largest = float(difference_BS.max())
        if not largest < LAYER.value:
            row, position = divmod(int(difference_BS.argmax()), difference_BS.size(1))
            return Departure(layer, largest, row, position)
    return None
