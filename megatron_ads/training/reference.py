"""The reference of a job: the weights that it started from, for log-probabilities that training must not drift from.

They are kept on the host and exchanged with the current ones, tensor by tensor, for as long as they are needed: besides
the host's copy nothing is held twice. A job that trains adapters keeps nothing: its base weights never change, so the
reference is the model with its adapters switched off.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_ads.models.lora import named_adapters
from megatron_ads.models.weights import model_tensors
from megatron_ads.training.build import TrainedModel


class ReferenceWeights:
    """One rank's part of the weights that a job started from. No method communicates."""

    def __init__(self, model: TrainedModel) -> None:
        """Copy what can change of the model to the host; take it before a checkpoint is loaded into the model.

        That is what is trained, and the router biases; of a job that trains adapters nothing.
        """
        self._adapters = [adapter for chunk in model.models for _, adapter in named_adapters(chunk)]
        self._current = [] if model.adapters is not None else _changing(model.models)
        self._kept = [tensor.detach().to("cpu", copy=True) for tensor in self._current]

    @property
    def host_bytes(self) -> int:
        """Memory that the copies take."""
        return sum(tensor.nbytes for tensor in self._kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Have the model compute as the reference inside the context; bit for bit as before behind it."""
        self._exchange()
        for adapter in self._adapters:
            adapter.enabled = False
        try:
            yield
        finally:
            for adapter in self._adapters:
                adapter.enabled = True
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for current, kept in zip(self._current, self._kept, strict=True):
            before = current.detach().to("cpu", copy=True)
            current.copy_(kept)  # in place: the gradient buffers and the optimizer hold views of the same memory
            kept.copy_(before)


def _changing(chunks: Sequence[torch.nn.Module]) -> list[Tensor]:
    tensors = [tensor for chunk in chunks for _, tensor in model_tensors(chunk)]
    return [tensor for tensor in tensors if tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)]
