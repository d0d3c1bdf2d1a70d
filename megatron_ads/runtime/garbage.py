"""Collect Python's garbage on all ranks at the same step.

Python collects whenever a rank has made so many objects, each rank at another moment; in a pipeline every such pause is
everybody's. Source: Megatron-LM's ``--manual-gc``.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def collected_together(interval: int | None) -> Iterator[Callable[[int], None]]:
    """Stop Python's own collections inside the context; yield what to call after each step, with its number.

    What exists on entering, the model above all, is not looked through again. None changes nothing.
    """
    if interval is None:
        yield lambda step: None
        return

    def after_step(step: int) -> None:
        if step % interval == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield after_step
    finally:
        gc.enable()
        gc.unfreeze()
