"""Warnings of torch and Megatron-Core that a user of this project can do nothing about."""

import warnings

_SILENCED = (
    # torch 2.13 renamed collectives that megatron-core 0.16.1 calls by the old names.
    (FutureWarning, r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"),
    # megatron-core 0.16.1 reads .grad of main parameters that are views; it sets them itself.
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    # megatron-core 0.16.1 warns about the default of an option for CUDA graphs that are off.
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_scope"),
)


def silence() -> None:
    """Show none of them; once per step and rank, they would hide what matters."""
    for category, message in _SILENCED:
        warnings.filterwarnings("ignore", message, category)
