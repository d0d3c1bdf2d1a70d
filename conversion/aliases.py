"""The tensors a Hugging Face checkpoint stores twice must be equal: Megatron holds them once."""

import torch

from conversion.errors import DamagedCheckpointError
from conversion.hf_folder import HfFolder
from conversion.regions import Region, bands, fill, value_dtype, whole
from conversion.sources import WeightSource


def check_aliases(source: WeightSource) -> None:
    """Compare every stored repeat with what it repeats.

    Raises:
        DamagedCheckpointError: If one differs: the MTP layer was trained with an embedding or head of its own, which
            no Megatron-Core model has.
    """
    folder = source.container
    if not isinstance(folder, HfFolder):
        return
    for alias, canonical in folder.aliases.items():
        shape = source.parameter(canonical).shape
        repeat = (Region(whole(shape), folder.matrix(alias)),)
        if not equal_values(repeat, source.regions(canonical), shape):
            raise DamagedCheckpointError(
                f"{alias} in {folder.tensors[alias].file} differs from {canonical}, which it should repeat: "
                "Megatron-Core stores them once. The checkpoint was changed after training, or is not of this family."
            )


def equal_values(left: tuple[Region, ...], right: tuple[Region, ...], shape: tuple[int, ...]) -> bool:
    """Whether two sets of regions hold the same bits, compared in the wider of their dtypes."""
    dtype = torch.promote_types(value_dtype(left), value_dtype(right))
    for band in bands(whole(shape)):
        a, b = (torch.empty(band.rows, band.columns, dtype=dtype) for _ in range(2))
        fill(a, left, band)
        fill(b, right, band)
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            return False
    return True
