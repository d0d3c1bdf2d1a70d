"""Refuse a training checkpoint whose pickled parts would run code, before Megatron-Core and torch unpickle them."""

import pickle
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from conversion.torch_dist_pickle import read_metadata
from megatron_ads.errors import CheckpointError


def refuse_foreign_pickles(folder: Path) -> None:
    """Read the pickled parts with readers that admit plain values and tensors only.

    Raises:
        ConversionError: If ``.metadata``, which torch unpickles freely, refers to anything but its format's classes.
        CheckpointError: If ``common.pt`` refers to anything but plain values and tensors, or ``.metadata`` names a
            pickled object where there should be a tensor: asked for, it would be unpickled freely too.
    """
    stored = read_metadata(folder / ".metadata").state_dict_metadata
    # Linears have a pickled _extra_state, which is written for stock Megatron and not asked for.
    objects = [key for key, entry in stored.items() if isinstance(entry, BytesStorageMetadata)]
    if foreign := [key for key in objects if "_extra_state" not in key]:
        raise CheckpointError(f"{folder} has {foreign[0]} as a pickled object, not as a tensor. {_UNTRUSTED}")
    try:
        torch.load(folder / "common.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(f"{folder / 'common.pt'} cannot be read safely: {reason} {_UNTRUSTED}") from None


_UNTRUSTED = "It is not loaded; go on from a checkpoint that this program wrote."
