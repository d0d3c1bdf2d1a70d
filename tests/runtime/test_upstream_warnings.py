"""Each silenced warning is still given by the library, and is silenced."""

import importlib
import logging
import warnings
from contextlib import suppress
from inspect import getsource

import torch
from torch.distributed import checkpoint
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.sharding_spec import ChunkShardingSpec

from megatron_ads.runtime import process_groups
from megatron_ads.runtime.megatron_version import megatron_core_since
from parity_tests.harness.ranks import run_ranks


def _warnings(silenced: bool) -> list[str]:
    """Do what brings each of them about; return the beginnings of those that were shown."""
    from megatron.core.distributed.param_and_grad_buffer import dist_all_gather_func, dist_reduce_scatter_func
    from megatron.core.optimizer.optimizer import _zero_grad_group_helper
    from megatron.core.transformer.transformer_config import TransformerConfig

    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        if silenced:
            process_groups.silence_upstream_warnings()
        dist_all_gather_func(torch.empty(2), torch.ones(2))
        dist_reduce_scatter_func(torch.empty(2), torch.ones(2))
        _zero_grad_group_helper([torch.ones(2, requires_grad=True)[:1]], set_to_none=True)
        TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1)
        with suppress(AttributeError):  # warned of before it looks at what it is given
            checkpoint.load_state_dict({}, None)  # type: ignore[arg-type]
        sharded_tensor.empty(ChunkShardingSpec(0, ["rank:0/cpu"]), 2).size()
    return sorted({str(warning.message)[:45] for warning in shown})


def test_each_warning_is_still_given() -> None:
    assert run_ranks(1, _warnings, False) == [
        [
            "Please use DTensor instead and we are depreca",
            "The .grad attribute of a Tensor that is not a",
            "`load_state_dict` is deprecated and will be r",
            "`torch.distributed.all_gather_into_tensor` is",
            "`torch.distributed.reduce_scatter_tensor` is ",
            "full scope is deprecated. Use empty cuda_grap",
        ]
    ]


def _unsilenced_loggers() -> list[str]:
    process_groups.silence_upstream_warnings()
    names = process_groups._SILENCED_LOGGERS
    # each is still the name of a module that logs warnings, in the versions that do
    modules = [importlib.import_module(name) for name in names]
    assert not megatron_core_since("0.19") or all("DEPRECATED" in getsource(m).upper() for m in modules)
    return [name for name in names if logging.getLogger(name).isEnabledFor(logging.WARNING)]


def test_what_megatron_core_0_19_logs_of_its_plans_is_silenced() -> None:
    assert run_ranks(1, _unsilenced_loggers) == [[]]


def test_none_of_them_is_shown_once_silenced() -> None:
    assert run_ranks(1, _warnings, True) == [[]]
