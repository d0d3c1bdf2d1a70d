"""Which Megatron-Core is installed, for the few modules that know its versions.

Supported are 0.16 to 0.19; tested are both ends (``launch/test.sh``, ``launch/test_matrix.sh``). Each concern that
differs is kept in one module:

    models/spec_arguments.py     what layer specs are made of
    models/mtp_loss.py           the MTP loss, which every version but 0.16 weighs otherwise
    models/experts.py            how the MTP layers are numbered
    runtime/cpu_compat.py        what Megatron-Core needs where no CUDA device exists
    training/common_state.py     where a checkpoint keeps what is not a tensor
"""

from functools import cache
from importlib.metadata import version

from packaging.version import Version


@cache
def megatron_core() -> Version:
    """Return the installed version, without importing Megatron-Core."""
    return Version(version("megatron-core"))


def megatron_core_since(first: str) -> bool:
    """Whether the installed version is ``first``, such as "0.17", or later; its own pre-releases count as it."""
    return megatron_core().release >= Version(first).release
