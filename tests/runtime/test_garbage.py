"""Garbage goes when all ranks collect it, not before, and Python is left as it was found."""

import gc
import weakref

import pytest

from megatron_ads.runtime.garbage import collected_together


class _Loop:
    """Refers to itself, so that only a collection frees it."""

    def __init__(self) -> None:
        self.own = self


def test_garbage_stays_until_the_step_of_the_collection() -> None:
    with collected_together(3) as after_step:
        assert not gc.isenabled()
        found = weakref.ref(_Loop())
        for step, there in ((1, True), (2, True), (3, False)):
            after_step(step)
            assert (found() is not None) is there
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_python_collects_again_after_an_error() -> None:
    with pytest.raises(RuntimeError, match="in a step"), collected_together(1):
        raise RuntimeError("in a step")
    assert gc.isenabled()


def test_none_leaves_it_to_python() -> None:
    with collected_together(None) as after_step:
        after_step(1)
        assert gc.isenabled() and gc.get_freeze_count() == 0
