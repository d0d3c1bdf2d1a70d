"""What a checkpoint of adapters says of itself: it has a meaning only with the weights it was trained on."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from conversion.names import ParameterKind, parameters
from conversion.regions import Rectangle, fill
from conversion.sources import WeightSource
from megatron_ads.errors import CheckpointError
from megatron_ads.models.parts import Lora


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterRecord:
    """The adapters of a job, and the weights they adapt."""

    rank: int
    scale: float
    targets: tuple[str, ...]
    with_mtp: bool
    base: str
    """Digest of the frozen weights; see ``base_digest``."""

    @classmethod
    def of(cls, lora: Lora, source: WeightSource, dtype: torch.dtype) -> "AdapterRecord":
        """Describe a job that has read its weights from ``source``; a collective, the same on every rank."""
        digest = [base_digest(source, dtype) if dist.get_rank() == 0 else ""]
        dist.broadcast_object_list(digest, src=0)
        targets = tuple(sorted(lora.targets))
        return cls(rank=lora.rank, scale=lora.scale, targets=targets, with_mtp=lora.with_mtp, base=digest[0])

    def as_json(self) -> dict[str, Any]:
        """Return what a manifest holds."""
        return asdict(self) | {"targets": list(self.targets)}


def base_digest(source: WeightSource, dtype: torch.dtype) -> str:
    """Return a digest of the first row of every projection, of one expert where there are many, in ``dtype``.

    It is the same for every format that a checkpoint is converted to. Two models of one shape, such as a model and what
    was trained from it, differ in some of these rows, unless ``model.frozen`` kept all projections.
    """
    digest = hashlib.sha256()
    for parameter in parameters(source.shape).values():
        if parameter.kind is ParameterKind.LINEAR and parameter.expert in (None, 0):
            row = torch.empty(1, parameter.shape[1], dtype=source.dtype(parameter.name))
            fill(row, source.regions(parameter.name), Rectangle(0, 0, 1, parameter.shape[1]))
            digest.update(row.to(dtype).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


_SETTINGS = {
    "rank": "model.lora.rank",
    "scale": "model.lora.alpha / model.lora.rank",
    "targets": "model.lora.targets",
    "with_mtp": "model.mtp_loss_weight above 0",
}
"""What decides each part of a record but its base."""


def require_same_adapters(folder: Path, saved: dict[str, Any] | None, wanted: AdapterRecord | None) -> None:
    """Refuse a checkpoint of other adapters, or of adapters where the weights are trained, and the reverse.

    ``saved`` is what its manifest says, ``wanted`` what this job trains (None: the weights).

    Raises:
        CheckpointError: Naming what differs.
    """
    ours = None if wanted is None else wanted.as_json()
    if saved == ours:
        return
    if saved is None or ours is None:
        said, set_to = ("adapters", "unset") if ours is None else ("the whole model", f"set to {ours['rank']}")
        what = f"holds {said}, but model.lora.rank is {set_to}"
    elif different := [name for name in _SETTINGS if saved.get(name) != ours[name]]:
        what = "holds adapters with " + ", ".join(
            f"{_SETTINGS[name]}: {saved.get(name)} instead of {ours[name]}" for name in different
        )
    else:
        what = "holds adapters to other weights than model.load has, or to weights in another model.precision"
    raise CheckpointError(
        f"checkpoint {folder} {what}. Go on with the settings it was saved with, or choose another checkpoint.dir."
    )
