"""Let Megatron-Core run where no CUDA device exists. Every change made to torch or Megatron for that is here.

For megatron-core 0.16 to 0.19. Each patch says what fails without it, and the versions that need it if not all do;
``tests/runtime/test_cpu_compat.py`` runs the unpatched library and fails as soon as a patch is no longer needed. Where
a CUDA device exists, only the two names are defined that Megatron-Core 0.16 lacks without Transformer Engine, and where
that is installed too, or in a later version, nothing is touched.
"""

import contextlib
import importlib
import logging
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_ads.runtime.device import transformer_engine_fault
from megatron_ads.runtime.megatron_version import megatron_core_since

_CPU = torch.device("cpu")

MODULES_THAT_NAME_CUDA = (
    "megatron.core.dist_checkpointing.exchange_utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.models.common.embeddings.rope_utils",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.rerun_state_machine",
    "megatron.core.tensor_parallel.data",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    *(() if megatron_core_since("0.18") else ("megatron.core.transformer.moe.moe_utils",)),
)
"""Megatron modules that create tensors with ``device="cuda"``, or in pinned memory, in training and checkpointing."""

_MODULES_THAT_WARN = ("megatron.core.models.gpt.gpt_layer_specs", "megatron.core.transformer.moe.moe_layer")
"""Imported here only so that their warnings about absent CUDA libraries are not shown on every rank."""

_installed = False


def install() -> None:
    """Patch torch and import Megatron-Core patched; call it before anything else imports that. May be repeated.

    Raises:
        RuntimeError: If Megatron-Core was imported earlier: its modules were then bound to the unpatched torch.
    """
    global _installed
    if _installed:
        return
    if torch.cuda.is_available():
        if transformer_engine_fault() is not None:
            with _quietly():  # each module that is imported warns of the absence
                for name in _MODULES_THAT_WARN:
                    importlib.import_module(name)
                for patch in TRANSFORMER_ENGINE_PATCHES:
                    patch()
        _installed = True
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError("cpu_compat.install() came after the first import of megatron.core; call it before.")
    for patch in TORCH_PATCHES:
        patch()
    with _without_compilation(), _without_wandb(), _quietly():
        for name in (*MODULES_THAT_NAME_CUDA, *_MODULES_THAT_WARN):
            importlib.import_module(name)
        for patch in MEGATRON_PATCHES:
            patch()
    _installed = True


def answer_device_queries() -> None:
    """``device=torch.cuda.current_device()`` is everywhere in Megatron and raises without a driver."""
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def answer_streams_and_events() -> None:
    """Token dispatcher and gradient buffers order work by streams; on a CPU everything is already in order."""
    torch.cuda.Stream = torch.cuda.Event = _NoStream  # type: ignore[assignment, misc]
    torch.cuda.current_stream = lambda device=None: _NO_STREAM  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: _NO_STREAM  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment, return-value]


def answer_rng_calls() -> None:
    """Megatron's RNG tracker saves, sets and seeds the CUDA generator; here that is the CPU's generator."""
    modules: tuple[Any, ...] = (torch.cuda, torch.cuda.random)
    for module in modules:
        module.get_rng_state = lambda device="cuda": torch.get_rng_state()
        module.set_rng_state = lambda new_state, device="cuda": torch.set_rng_state(new_state)
        module.manual_seed = lambda seed: torch.manual_seed(seed)


def keep_tensors_on_the_cpu() -> None:
    """``Tensor.cuda()`` is called on checkpoint loading, tied embeddings and context-parallel rotary slices."""
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]


def call_cpu_tensors_cuda_tensors() -> None:
    """The optimizers compare ``param.type()`` with ``"torch.cuda.FloatTensor"``; only Megatron is told so."""
    original = torch.Tensor.type

    def type_as_megatron_expects(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if isinstance(answer, str) and caller.startswith("megatron.core."):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_as_megatron_expects  # type: ignore[method-assign, assignment]


def map_cuda_factories_to_the_cpu() -> None:
    """``torch.zeros(1, device="cuda")``, ``pin_memory=True``: modules that say so get a torch that answers for a CPU.

    A ``TorchFunctionMode`` would do this too, at a price on every operation of the model.
    """
    for name in MODULES_THAT_NAME_CUDA:
        sys.modules[name].torch = _CPU_TORCH  # type: ignore[attr-defined]


def set_rng_state_at_once() -> None:
    """Megatron sets the CUDA generator by a call that torch queues until CUDA starts: never, and the queue grows."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def define_te_general_gemm() -> None:
    """0.16: the router tests ``te_general_gemm is not None``, a name that is missing without Transformer Engine."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    moe_utils.te_general_gemm = None


def define_te_linear() -> None:
    """0.16: latent attention asks ``isinstance(linear_proj, TELinear)``: a mock object without Transformer Engine."""
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.TELinear = type("TELinear", (), {"__doc__": "No module is one."})


def give_all_to_all_its_splits_as_numbers() -> None:
    """Split sizes become numbers only on their way from a GPU; all-to-all takes no tensors as split sizes."""
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")
    dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor
    )


TORCH_PATCHES: tuple[Callable[[], None], ...] = (
    answer_device_queries,
    answer_streams_and_events,
    answer_rng_calls,
    keep_tensors_on_the_cpu,
    call_cpu_tensors_cuda_tensors,
)
"""Made before Megatron is imported."""

TRANSFORMER_ENGINE_PATCHES: tuple[Callable[[], None], ...] = (
    () if megatron_core_since("0.17") else (define_te_general_gemm, define_te_linear)
)
"""Made on Megatron's modules where Transformer Engine is absent, also with a CUDA device."""

MEGATRON_PATCHES: tuple[Callable[[], None], ...] = (
    map_cuda_factories_to_the_cpu,
    set_rng_state_at_once,
    *TRANSFORMER_ENGINE_PATCHES,
    give_all_to_all_its_splits_as_numbers,
)
"""Made on Megatron's modules once they are imported."""


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """Make ``jit_fuser``, bound to ``torch.compile`` on import, do nothing: compiling wants a C++ compiler here."""
    compile_ = torch.compile
    torch.compile = lambda function=None, **options: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Show no warnings, nor what torch logs of CUDA tools without a device when megatron-core 0.19 is imported."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _without_wandb() -> Iterator[None]:
    """Keep Megatron's inference engine from importing wandb, which takes 0.7 CPU seconds of every rank for nothing."""
    before = sys.modules.get("wandb")
    sys.modules["wandb"] = None  # type: ignore[assignment]  # so `import wandb` raises ImportError
    try:
        yield
    finally:
        del sys.modules["wandb"]
        if before is not None:
            sys.modules["wandb"] = before


class _NoStream:
    """A stream, and an event, on which all work is done as soon as it is issued."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record_event(self, event: "_NoStream | None" = None) -> "_NoStream":
        return event or self

    def synchronize(self, other: "_NoStream | None" = None) -> None: ...

    record = wait = wait_stream = wait_event = synchronize

    def query(self) -> bool:
        return True


_NO_STREAM = _NoStream()


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


_CPU_TORCH: Any = types.ModuleType("torch")
"""The torch module, except that its tensor factories take ``device="cuda"`` for the CPU and pin no memory."""
_CPU_TORCH.__getattr__ = lambda name: getattr(torch, name)
for _name in ("tensor", "zeros", "ones", "empty", "empty_like", "full", "arange"):
    setattr(_CPU_TORCH, _name, _on_cpu(getattr(torch, _name)))
