"""The weights that a job began with, on the host: the reference policy of a KL term.

Only what is trained is kept. With adapters that is them alone: those a job begins with add nothing, so the model
without adapters is the reference.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor

from megatron_ads.training.build import TrainedModel


class ReferenceWeights:
    """One rank's part. The host holds one copy, as the two change places."""

    def __init__(self) -> None:
        self._changing: list[Tensor] = []
        self._kept: list[Tensor] = []

    def keep(self, model: TrainedModel) -> None:
        """Keep what ``model`` holds now: before a checkpoint is loaded into it."""
        self._changing = list(_changing(model))
        self._kept = [tensor.detach().cpu().clone() for tensor in self._changing]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the model be the reference inside the context."""
        self._change_places()
        yield
        self._change_places()

    @torch.no_grad()
    def _change_places(self) -> None:
        for tensor, kept in zip(self._changing, self._kept, strict=True):
            current = tensor.detach().cpu().clone()
            tensor.copy_(kept)
            kept.copy_(current)


def _changing(model: TrainedModel) -> Iterator[Tensor]:
    """Yield trained parameters, and the router's selection biases, which change without a gradient."""
    for part in model.models:
        trained = (parameter for parameter in part.parameters() if parameter.requires_grad)
        biases = (buffer for name, buffer in part.named_buffers() if name.endswith("expert_bias"))
        yield from chain(trained, biases)
