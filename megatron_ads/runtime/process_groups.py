"""Start and stop the process groups of a job: torch's default group and those of Megatron-Core.

Every group has the job's timeout, so that no wait lasts for ever.
"""

import logging
import os
import warnings
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from megatron_ads.errors import ConfigError, TopologyError
from megatron_ads.layout import ParallelLayout, describe_ranks, rank, world_size
from megatron_ads.runtime import cpu_compat, host_syncs
from megatron_ads.runtime.device import backend, device, use_own_device

RANK_ORDER = "tp-cp-ep-dp-pp"
"""Megatron's name for the rank order that ``ParallelLayout.coordinates`` describes."""

_SILENCED = (
    # torch 2.13 renamed collectives that megatron-core (0.16 to 0.19) calls by the old names.
    (FutureWarning, r"`torch\.distributed\.(reduce_scatter_tensor|all_gather_into_tensor)` is deprecated"),
    # megatron-core (0.16 to 0.19) reads checkpoints by names that torch 2.13 has replaced.
    (FutureWarning, r"`load_state_dict` is deprecated and will be removed in future versions"),
    (FutureWarning, r"Please use DTensor instead and we are deprecating ShardedTensor"),
    # megatron-core (0.16 to 0.19) reads .grad of main parameters that are views; it sets them itself.
    (UserWarning, r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed"),
    # megatron-core (0.16 to 0.19) warns about the default of an option for CUDA graphs that are off.
    (UserWarning, r"full scope is deprecated\. Use empty cuda_graph_(scope|modules)"),
)
"""Warnings of torch and Megatron-Core that a user of this project can do nothing about."""

_SILENCED_LOGGERS = (
    "megatron.core.models.gpt.gpt_model",  # since 0.19: GPTModel gets fixes only, new features are HybridModel's
    "megatron.core.dist_checkpointing.strategies.common",  # 0.19: common.pt is read, and deprecated
)

_USES = "uses of rank {}"
"""Key of how often a rank has used a part of the job's store."""

EmbeddingRanks = Callable[[list[int]], list[int]]
"""Given the ranks of one pipeline group, those that hold a copy of the word embedding."""


def start(
    layout: ParallelLayout,
    *,
    timeout_seconds: float = 600.0,
    embedding_ranks: EmbeddingRanks | None = None,
    create_gloo_process_groups: bool = True,
) -> None:
    """Join the job that the environment of torchrun or srun describes and build Megatron's groups for ``layout``.

    A default process group that exists already is used as it is. Call before any other use of Megatron-Core.

    Args:
        timeout_seconds: After which a collective that some member has not joined ends the job.
        embedding_ranks: None for the first and last of each pipeline group.
        create_gloo_process_groups: Whether to double the data-parallel groups with gloo, which checkpoints need.

    Raises:
        ConfigError: If the number of running ranks is not ``layout.world``, or no meeting point is given.
    """
    world = dist.get_world_size() if dist.is_initialized() else world_size()
    if world != layout.world:
        raise ConfigError(
            f"The layout is for {layout.world} ranks (pp * dp * cp * tp = {layout.pp} * {layout.dp} * {layout.cp} * "
            f"{layout.tp}), but {world} are running. Launch {layout.world} processes, or change the layout."
        )
    cpu_compat.install()
    host_syncs.install()
    silence_upstream_warnings()
    timeout = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        _join(layout.world, timeout)
    _build_megatron_groups(layout, timeout, embedding_ranks, create_gloo_process_groups)
    for group in dist.distributed_c10d._world.pg_map:
        group.set_timeout(timeout)  # Megatron creates one of its gloo groups without a timeout


def new_group(ranks: list[int]) -> dist.ProcessGroup:
    """Make a group of some ranks with the job's timeout, which torch would not give it; a collective of all ranks."""
    timeout = dist.distributed_c10d._get_default_group()._get_backend(device()).options._timeout
    group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout)
    return group


def start_fake(layout: ParallelLayout, rank: int) -> None:
    """Take the place of one rank of ``layout`` alone in this process: collectives return at once, unchanged."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    cpu_compat.install()
    silence_upstream_warnings()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    _build_megatron_groups(layout, timedelta(minutes=1), None, create_gloo=False)


def stop() -> None:
    """Leave the job: forget Megatron's groups and destroy every process group. Does nothing when none is there."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _join(world: int, timeout: timedelta) -> None:
    os.environ.setdefault("RANK", str(rank()))
    os.environ.setdefault("WORLD_SIZE", str(world))
    if world == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ConfigError(
            f"{' and '.join(missing)} not set for a job of {world} ranks. "
            "Start it with torchrun, or export the first machine's name and a free port of it."
        )
    use_own_device()
    # Without device_id: with it each of Megatron's groups, 1,460 in a job of 248 ranks, is split off the whole job's
    # NCCL communicator at once, a collective of all ranks (torch 2.13); NeMo-RL #3073 measured slower training besides.
    dist.init_process_group(backend(), timeout=timeout)


def _build_megatron_groups(
    layout: ParallelLayout, timeout: timedelta, embedding_ranks: EmbeddingRanks | None, create_gloo: bool
) -> None:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=timeout.total_seconds() / 60,
        order=RANK_ORDER,
        get_embedding_ranks=embedding_ranks,
        create_gloo_process_groups=create_gloo,
    )


def silence_upstream_warnings() -> None:
    """Hide what a user can do nothing about: once per step and rank, it would bury what matters."""
    for category, message in _SILENCED:
        warnings.filterwarnings("ignore", message, category)
    for name in _SILENCED_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


def wait_for_all(purpose: str, timeout_seconds: float) -> None:
    """Return when every rank has come here: a barrier through the job's store, with a time limit of its own.

    For what may take ranks longer than a communication may last, such as reading weights from slow storage. Nobody
    waits in a communication meanwhile, so neither NCCL nor the watch over hangs ends the job.

    Args:
        purpose: What the ranks have done, as in "load the weights".

    Raises:
        TopologyError: On every rank that waits, naming those that have not come in time.
    """
    world = dist.get_world_size()
    store, uses = _part_of_store(purpose)
    if store.add(f"here/{uses}", 1) == world:
        store.set(f"all/{uses}", "here")
        for key in ("here", "all"):  # all have left the use before; rank 0 has the whole store in its memory
            store.delete_key(f"{key}/{uses - 1}")
    try:
        store.wait([f"all/{uses}"], timedelta(seconds=timeout_seconds))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        lost = isinstance(error, dist.DistNetworkError)  # rank 0 holds the store
        missing = [0] if lost else [rank for rank in range(world) if store.add(_USES.format(rank), 0) < uses]
        raise TopologyError(
            f"{describe_ranks(missing)} of {world} did not {purpose} within {timeout_seconds:g} s "
            "(runtime.load_timeout_seconds). Look at the log of the first of them; raise the limit if it is only slow."
        ) from error


def job_store(purpose: str) -> Store:
    """Return a part of the store through which the ranks found each other, for what must work without collectives.

    Only ``purpose`` uses it; it is new at each use as long as every rank makes the same.
    """
    store, uses = _part_of_store(purpose)
    return PrefixStore(str(uses), store)


def _part_of_store(purpose: str) -> tuple[Store, int]:
    """Return what all uses for a purpose share, and how many this rank has made, this one included."""
    store = PrefixStore(f"megatron-ads/{purpose}", dist.distributed_c10d._get_default_store())
    return store, store.add(_USES.format(dist.get_rank()), 1)
