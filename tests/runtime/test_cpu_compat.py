"""Each patch of the compatibility module: what fails without it, and that it does not with it.

One fresh process runs every case on the unpatched library. A case that passes there means that upstream no longer
needs the patch, which should then go.
"""

import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist

from megatron_ads.runtime import cpu_compat
from megatron_ads.runtime.megatron_version import megatron_core_since
from parity_tests.harness.ranks import run_ranks

BEFORE_0_17 = not megatron_core_since("0.17")


def _allocate_on_the_current_device() -> None:
    from megatron.core.utils import GlobalMemoryBuffer

    assert GlobalMemoryBuffer().get_tensor([2, 3], torch.float32, "case").shape == (2, 3)


def _create_streams() -> None:
    from megatron.core.pipeline_parallel import utils

    utils.set_streams()
    with torch.cuda.stream(utils.get_comm_stream()):
        utils.get_comm_stream().wait_stream(utils.get_comp_stream())
        utils.get_comm_stream().record_event().synchronize()


def _add_rng_stream() -> None:
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("case", 7)
    assert torch.equal(tracker.get_states()["case"], torch.Generator().manual_seed(7).get_state())


def _restore_rng_state() -> None:
    from megatron.core.tensor_parallel.random import _set_cuda_rng_state

    state = torch.get_rng_state()
    drawn = torch.rand(3)
    _set_cuda_rng_state(state)
    assert torch.equal(torch.rand(3), drawn), "the state was not set"


def _move_to_cuda() -> None:
    torch.zeros(2).cuda(torch.cuda.current_device(), non_blocking=True)


def _clip_gradients() -> None:
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    weight = torch.zeros(2, requires_grad=True)
    weight.grad = torch.tensor([0.0, 1.0])
    clip_grad_by_total_norm_fp32([weight], max_norm=2.0, total_norm=1.0)


def _create_causal_mask() -> None:
    from megatron.core.transformer.utils import get_default_causal_mask

    assert get_default_causal_mask(2).tolist() == [[False, True], [False, False]]


def _slice_rotary_table() -> None:
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    class SecondOfTwo:
        size, rank = staticmethod(lambda: 2), staticmethod(lambda: 1)

    # Of four pieces, context-parallel rank 1 of 2 holds the two in the middle.
    table = get_pos_emb_on_this_cp_rank(torch.arange(4.0), 0, SecondOfTwo())
    assert table.tolist() == [1.0, 2.0]


def _route_tokens() -> None:
    from megatron.core.transformer.moe.moe_utils import router_gating_linear

    scores = router_gating_linear(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None, torch.float32)
    assert scores.tolist() == [[3.0]]


def _ask_for_te_linear() -> None:
    from megatron.core.transformer import multi_latent_attention

    assert "isinstance(self.linear_proj, TELinear)" in inspect.getsource(multi_latent_attention)
    assert not isinstance(torch.nn.Linear(1, 1), multi_latent_attention.TELinear)


def _exchange_tokens() -> None:
    from megatron.core.transformer.moe.token_dispatcher import maybe_move_tensor_to_cpu

    splits = maybe_move_tensor_to_cpu(torch.tensor([2]), as_numpy=True)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    received = torch.empty(2)
    dist.all_to_all_single(received, torch.ones(2), splits, splits)
    assert received.tolist() == [1.0, 1.0]


def _fuse_nothing() -> None:
    from megatron.core.jit import jit_fuser

    assert jit_fuser is not torch.compile, "functions are compiled"


CASES: dict[str, tuple[Callable[[], None], ...]] = {
    "answer_device_queries": (_allocate_on_the_current_device,),
    "answer_streams_and_events": (_create_streams,),
    "answer_rng_calls": (_add_rng_stream,),
    "keep_tensors_on_the_cpu": (_move_to_cuda,),
    "call_cpu_tensors_cuda_tensors": (_clip_gradients,),
    "map_cuda_factories_to_the_cpu": (_create_causal_mask, _slice_rotary_table),
    "set_rng_state_at_once": (_restore_rng_state,),
    "define_te_general_gemm": (_route_tokens,),
    "define_te_linear": (_ask_for_te_linear,),
    "give_all_to_all_its_splits_as_numbers": (_exchange_tokens,),
    "_without_compilation": (_fuse_nothing,),
}
"""What needs each patch, by the patch's name."""

CASES = {patch: cases for patch, cases in CASES.items() if not patch.startswith("define_te_") or BEFORE_0_17}

_ALL_CASES = {case.__name__: case for cases in CASES.values() for case in cases}


def _errors() -> dict[str, str]:
    """Run every case in this process and return the errors of those that failed, by case."""
    errors = {}
    for name, case in _ALL_CASES.items():
        try:
            case()
        except Exception as error:  # noqa: BLE001 - which kind it is differs between builds of torch
            errors[name] = repr(error)
    return errors


def _python(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.getcwd()}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture(scope="module")
def unpatched() -> dict[str, str]:
    code = "import json; from tests.runtime import test_cpu_compat as t; print(json.dumps(t._errors()))"
    answer: dict[str, str] = json.loads(_python(code).stdout)
    return answer


@pytest.fixture(scope="module")
def patched() -> dict[str, str]:
    (answer,) = run_ranks(1, _errors)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.slow
@pytest.mark.parametrize("case", list(_ALL_CASES))
def test_unpatched_megatron_still_fails(case: str, unpatched: dict[str, str]) -> None:
    assert case in unpatched, "upstream runs this without help; remove the patch"


@pytest.mark.parametrize("case", list(_ALL_CASES))
def test_patched_megatron_works(case: str, patched: dict[str, str]) -> None:
    assert patched.get(case) is None


def test_every_patch_has_a_case() -> None:
    patches = {patch.__name__ for patch in (*cpu_compat.TORCH_PATCHES, *cpu_compat.MEGATRON_PATCHES)}
    assert patches | {"_without_compilation"} == set(CASES)
    assert len(patches) == (10 if BEFORE_0_17 else 8)


def _modules_that_do_not_name_cuda() -> list[str]:
    modules = [importlib.import_module(name) for name in cpu_compat.MODULES_THAT_NAME_CUDA]
    marks = ('device="cuda"', "device='cuda'", "pin_memory=True")
    return [module.__name__ for module in modules if not any(mark in inspect.getsource(module) for mark in marks)]


def test_every_module_that_gets_another_torch_still_names_cuda() -> None:
    assert len(cpu_compat.MODULES_THAT_NAME_CUDA) == (12 if megatron_core_since("0.18") else 13)
    assert run_ranks(1, _modules_that_do_not_name_cuda) == [[]]


def _type_seen_outside_megatron() -> str:
    return str(torch.zeros(1).type())


def test_only_megatron_is_told_that_a_tensor_is_on_a_device() -> None:
    assert run_ranks(1, _type_seen_outside_megatron) == ["torch.FloatTensor"]


def test_installing_is_silent_imports_nothing_for_nothing_and_may_be_repeated() -> None:
    twice = "from megatron_ads.runtime import cpu_compat; cpu_compat.install(); cpu_compat.install()"
    slow = "import sys; assert not sys.modules.keys() & {'wandb', 'torch._inductor'}; import wandb"
    done = _python(f"{twice}; {slow}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_installing_after_megatron_is_refused() -> None:
    done = _python("import megatron.core; from megatron_ads.runtime import cpu_compat; cpu_compat.install()")
    assert "install() came after the first import of megatron.core" in done.stderr


_INSTALL_WITH_A_DEVICE = """
import importlib.util, sys, torch
torch.cuda.is_available = lambda: True
before = torch.cuda.current_device, torch.cuda.Stream, torch.Tensor.type, torch.Tensor.cuda
from megatron_ads.runtime import cpu_compat
if {with_te}:
    cpu_compat.transformer_engine_fault = lambda: None
cpu_compat.install()
assert (torch.cuda.current_device, torch.cuda.Stream, torch.Tensor.type, torch.Tensor.cuda) == before
assert ("megatron.core" in sys.modules) is not {with_te}
"""


def test_no_device_is_stood_in_for_where_one_exists() -> None:
    done = _python(
        _INSTALL_WITH_A_DEVICE.format(with_te=False)
        + "from megatron.core.transformer import multi_latent_attention\n"
        + "from megatron.core.transformer.moe import moe_utils\n"
        + "assert moe_utils.torch is torch and moe_utils.te_general_gemm is None\n"
        + f"assert isinstance(multi_latent_attention.TELinear, type) is {BEFORE_0_17}\n"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_is_touched_where_a_device_and_transformer_engine_exist() -> None:
    done = _python(_INSTALL_WITH_A_DEVICE.format(with_te=True))
    assert (done.returncode, done.stderr) == (0, "")
