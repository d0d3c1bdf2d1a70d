"""Which Megatron-Core is installed, for the few modules that know its versions.

Supported are 0.16 to 0.19; tested are both ends (``launch/test.sh``, ``launch/test_matrix.sh``). Each concern that
differs is kept in one module:

    models/spec_arguments.py       what layer specs are made of
    models/specs.py                the MTP layer, which recomputes packed rows since 0.18 only
    models/attention.py            latent attention, which 0.19 gives norms of its own choice
    models/transformer_config.py   the balancing loss, which is scaled rightly since 0.19 only
    models/mtp_loss.py             the MTP loss, which every version but 0.16 weighs otherwise
    models/experts.py              how the MTP layers are numbered
    runtime/cpu_compat.py          what Megatron-Core needs where no CUDA device exists
    training/checkpoint_writer.py  where a checkpoint keeps what is not a tensor
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
