"""Router replay: an update sends each token to the experts that an earlier pass over the same rows chose for it.

How much each of them counts is still computed by the current router, which gets its gradients so, but between the two
passes no expert is exchanged for another: their log-probabilities differ by the weights alone (Routing Replay,
arXiv:2507.18071, section 5.3; verl's ``router_replay.mode`` R2).

Megatron-Core (0.16 to 0.19) asks ``TopKRouter.router_replay``, where it is set, for the experts of each microbatch. Its
own ``RouterReplay`` keeps those of the latest microbatch. Here they are kept by row and position: a later pass may pack
the rows, and spread them over the ranks, in another way.

Shape suffixes: T = tokens of one microbatch that this rank routes, E = experts, K = experts chosen for each token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_ads.data.packed_batch import PLACE, PackedBatch
from megatron_ads.rows import TokenizedRow
from megatron_ads.runtime.device import device, on_device

TopK = Callable[..., tuple[Tensor, Tensor]]
"""Megatron's own choice: values and experts, (T, K) each, of the scores (T, E)."""


class ExpertChoices:
    """The experts that each token of some rows was sent to, in this rank's layers; those of all replicas, on the host.

    A byte for each token, layer and chosen expert; two with more than 256 experts.
    """

    def __init__(self, models: Sequence[torch.nn.Module], rows: Sequence[TokenizedRow]) -> None:
        """Prepare to keep what ``models``, this rank's chunks, choose for ``rows``."""
        self._routers = [each for model in models for each in model.modules() if isinstance(each, TopKRouter)]
        self._tokens = sum(row.predictions for row in rows)
        self._chosen: dict[TopKRouter, Tensor] = {}

    @contextmanager
    def recorded(self, batches: Sequence[PackedBatch]) -> Iterator[None]:
        """Keep what a pass without gradients over ``batches`` chooses inside the context; a collective of a stage.

        The batches hold all rows, each token's place (``data.packed_batch.places``) in ``extra``.
        """
        recorders = {router: _Recorder(_integer_type(router)) for router in self._routers}
        with _asked(recorders):
            yield
        of_batches = [_places(batch) for batch in batches]
        # The layers of MTP are built and never run.
        ran = {router: recorder.chosen for router, recorder in recorders.items() if recorder.chosen}
        self._chosen = {router: self._of_all_replicas(of_batches, chosen, router) for router, chosen in ran.items()}

    def _of_all_replicas(self, places: Sequence[Tensor], chosen: Sequence[Tensor], router: TopKRouter) -> Tensor:
        """Return the choices (1 + tokens, K) by place, on the host; what is at 0, the place of padding, means nothing.

        Every token is routed by one rank of the stage, so that bytes of all others are 0 and their sum is the choice.
        """
        table = torch.zeros(1 + self._tokens, router.topk, dtype=_integer_type(router), device=device())
        for place_T, chosen_TK in zip(places, chosen, strict=True):
            table[on_device(place_T)] = chosen_TK
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(table.view(torch.uint8), group=group)  # NCCL has no sum of int16
        return table.cpu()

    @contextmanager
    def replayed(self, batches: Sequence[PackedBatch]) -> Iterator[None]:
        """Have a pass over ``batches``, with gradients or without, choose inside the context what was recorded.

        They may hold some of the rows, packed in any way, their places as in ``recorded``. Padding is routed as usual.
        """
        places = [_places(batch) for batch in batches]
        with _asked({router: _Replayer(chosen, places) for router, chosen in self._chosen.items()}):
            yield


def _integer_type(router: TopKRouter) -> torch.dtype:
    """Return the smallest type that every expert's number fits."""
    return torch.uint8 if router.config.num_moe_experts <= 256 else torch.int16


def _places(batch: PackedBatch) -> Tensor:
    """Return the places (T,) of the tokens that this rank routes: with sequence parallelism, its part of them."""
    rank, size = parallel_state.get_tensor_model_parallel_rank(), parallel_state.get_tensor_model_parallel_world_size()
    return batch.extra[PLACE].view(-1).chunk(size)[rank]


@contextmanager
def _asked(choices: Mapping[TopKRouter, Any]) -> Iterator[None]:
    """Have each router ask for its choices inside the context."""
    for router, of_router in choices.items():
        router.router_replay = of_router
    try:
        yield
    finally:
        for router in choices:
            router.router_replay = None


class _Recorder:
    """Keeps what a router chooses for each microbatch."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.chosen: list[Tensor] = []

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK
    ) -> tuple[Tensor, Tensor]:
        """Return what ``default`` does, Megatron's interface (``RouterReplay.get_replay_topk``)."""
        values_TK, chosen_TK = default(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        self.chosen.append(chosen_TK.to(self._dtype))
        return values_TK, chosen_TK


class _Replayer:
    """Gives a router its recorded choices."""

    def __init__(self, chosen: Tensor, places: Sequence[Tensor]) -> None:
        self._chosen, self._places = chosen, places
        # A router gets the microbatches in order. One that is recomputed gets each of them twice, first without
        # gradients and, when others have been through, with them: both in order.
        self._calls = {False: 0, True: 0}

    def get_replay_topk(
        self, scores_TE: Tensor, topk: int, num_groups: int | None, group_topk: int | None, default: TopK
    ) -> tuple[Tensor, Tensor]:
        """Return the current scores (T, K) of the recorded experts, and these; of padding, what ``default`` does."""
        place_T = self._places[self._calls[torch.is_grad_enabled()]]
        self._calls[torch.is_grad_enabled()] += 1
        _, own_TK = default(scores_TE, topk, num_groups=num_groups, group_topk=group_topk)
        is_token_T = on_device(place_T > 0)
        chosen_TK = torch.where(is_token_T[:, None], on_device(self._chosen[place_T]).long(), own_TK)
        return scores_TE.gather(1, chosen_TK), chosen_TK
