"""What is built on a rank: marks on parameters, placement, and refusals of what Megatron-Core cannot express."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from conversion.layer_specs import LayerSpec
from conversion.sources import open_source
from megatron_ads.config.model import LayerSpecChoice, ModelConfig
from megatron_ads.errors import ConfigError
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.models.settings import ModelSettings, resolve_layer_spec
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import seed_everything
from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint

_MARKS = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("build") / "hf", V3)


def _marks(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the marks of each parameter: ours, and those of a model that Megatron initialised itself."""
    process_groups.start(job.layout)
    seed_everything(1)
    from megatron_ads.models import build, transformer_config

    def marks() -> dict[str, Any]:
        shape = open_source(job.folder).shape
        (model,) = build.build_chunks(
            shape, job.layout, place_layers(shape, job.layout), ModelSettings(spec=LayerSpec.LOCAL)
        )
        return {
            name: [getattr(parameter, mark, None) or None for mark in _MARKS]
            for name, parameter in model.named_parameters()
        }

    def initialised(*args: Any) -> Any:
        return replace(transformer_config.megatron_config(*args), perform_initialization=True)

    ours = marks()
    build.megatron_config = initialised  # type: ignore[assignment]
    try:
        return ours, marks()
    finally:
        build.megatron_config = transformer_config.megatron_config


def test_weights_carry_the_marks_that_megatron_gives_when_it_initialises_them(folder: Path) -> None:
    layout = ParallelLayout(world=2, tp=2, etp=2)
    for ours, stock in run_ranks(2, _marks, Job(folder=folder, layout=layout)):
        assert ours.keys() == stock.keys() and len(ours) > 300
        # Megatron marks the stride of gate and up, which nothing reads once weights are made; ours has none.
        for name, marks in stock.items():
            assert [mark for mark, kind in zip(ours[name], _MARKS, strict=True) if kind != "partition_stride"] == [
                mark for mark, kind in zip(marks, _MARKS, strict=True) if kind != "partition_stride"
            ], name


def _expert_marks(job: Job) -> set[tuple[bool, bool]]:
    (model,), _, _ = model_jobs.build(job)
    from megatron_ads.models.build import routed_experts

    return {(parameter.allreduce, parameter.tensor_model_parallel) for parameter in routed_experts(model)}


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.GROUPED])
@pytest.mark.parametrize("layout", [ParallelLayout(world=1), ParallelLayout(world=2, ep=2)], ids=["alone", "ep2"])
def test_experts_are_reduced_apart_and_counted_in_full(folder: Path, spec: LayerSpec, layout: ParallelLayout) -> None:
    marks = run_ranks(layout.world, _expert_marks, Job(folder=folder, layout=layout, settings={"spec": spec}))
    assert marks == [{(False, True)}] * layout.world


def _held(job: Job) -> list[tuple[str, int]]:
    chunks, _, spec = model_jobs.build(job)
    from megatron_ads.models.weights import named_weights

    return [(name, piece.numel()) for weight in named_weights(chunks, spec) for name, piece in weight.pieces()]


def test_the_ranks_of_a_layout_hold_every_weight_of_the_checkpoint(folder: Path) -> None:
    source = open_source(folder)
    layout = ParallelLayout(world=4, pp=2, ep=2)
    held = run_ranks(4, _held, Job(folder=folder, layout=layout, pipeline="Ett|ttmL"))
    assert {name for rank in held for name, _ in rank} == set(source.names())
    assert not any(".mlp.experts." in name for name, _ in held[0])  # the first stage is dense
    assert len([name for name, _ in held[2] if ".mlp.experts." in name]) == 3 * 2 * 64 // 2


def _config(folder: Path, layout: ParallelLayout, *, pipeline: str | None = None, **changes: Any) -> Any:
    from megatron_ads.models.transformer_config import megatron_config

    shape = replace(open_source(folder).shape, **changes)
    settings = ModelSettings(spec=LayerSpec.GROUPED)
    return megatron_config(shape, layout, place_layers(shape, layout, pipeline=pipeline), settings)


_ALONE = ParallelLayout(world=1)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        ({"layout": ParallelLayout(world=2, cp=2)}, "layout.cp is 2"),
        ({"layout": _ALONE, "experts_per_token": 4}, "4 / 4"),
        ({"layout": _ALONE, "normalize_expert_weights": False}, "norm_topk_prob is False"),
        ({"layout": ParallelLayout(world=2, pp=2), "pipeline": "Etttt|mL"}, None),
        ({"layout": ParallelLayout(world=4, pp=4), "pipeline": "Ettt|tm||L"}, "Write mL together, or m|L"),
    ],
    ids=["context parallel", "group scores", "no normalisation", "fine", "MTP far from the loss"],
)
def test_what_megatron_computes_differently_is_refused(
    folder: Path, refused: dict[str, Any], message: str | None
) -> None:
    if message is None:
        assert _config(folder, **refused).num_layers == 4
        return
    with pytest.raises(ConfigError, match=message):
        _config(folder, **refused)


def test_interleaved_stages_never_batch_their_messages(folder: Path) -> None:
    config = _config(folder, ParallelLayout(world=2, pp=2, vpp=2))
    assert (config.overlap_p2p_comm, config.batch_p2p_comm) == (True, False)
    assert _config(folder, ParallelLayout(world=2, pp=2)).overlap_p2p_comm is False


def test_settings_are_taken_from_a_recipe() -> None:
    model = ModelConfig(load="x", expert_bias_update_rate=0.001)
    assert ModelSettings.of(model).expert_bias_update_rate == 0.001
    assert ModelSettings.of(ModelConfig(load="x")).expert_bias_update_rate == 0.0


def _transformer_engine(monkeypatch: pytest.MonkeyPatch, *, gpu: tuple[int, int] | None, compiled: bool) -> None:
    """Pretend that its package is installed, on a machine with a GPU or without, its part for torch usable or not."""
    for module in ("models.settings", "runtime.device"):
        monkeypatch.setattr(f"megatron_ads.{module}.find_spec", lambda name: object())
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu is not None)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: gpu)
    monkeypatch.setitem(sys.modules, "transformer_engine", ModuleType("transformer_engine"))
    # None makes the import fail
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("pytorch") if compiled else None)


@pytest.mark.parametrize(
    ("gpu", "compiled", "fault"),
    [
        ((9, 0), True, None),
        ((10, 3), True, None),
        (None, True, "there is no GPU here"),
        ((9, 0), False, "its part for torch cannot be imported"),
        ((8, 0), True, r"compute capability 9.0 \(Hopper\) and this GPU has 8.0"),
    ],
    ids=["hopper", "blackwell", "login node", "core wheel only", "ampere"],
)
def test_transformer_engine_is_taken_where_it_runs(
    monkeypatch: pytest.MonkeyPatch, gpu: tuple[int, int] | None, compiled: bool, fault: str | None
) -> None:
    _transformer_engine(monkeypatch, gpu=gpu, compiled=compiled)
    wanted = LayerSpec.TE if fault is None else LayerSpec.GROUPED
    assert resolve_layer_spec(LayerSpecChoice.auto) is wanted
    if fault is None:
        assert resolve_layer_spec(LayerSpecChoice.te) is LayerSpec.TE
    else:
        with pytest.raises(ConfigError, match=fault):
            resolve_layer_spec(LayerSpecChoice.te)


def test_without_transformer_engine_experts_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ads.models.settings.find_spec", lambda name: None)
    assert resolve_layer_spec(LayerSpecChoice.auto) is LayerSpec.GROUPED
    assert resolve_layer_spec(LayerSpecChoice.local) is LayerSpec.LOCAL
    with pytest.raises(ConfigError, match="it is not installed"):
        resolve_layer_spec(LayerSpecChoice.te)


@pytest.mark.parametrize(("vpp", "freed"), [(1, True), (2, False)])
def test_the_device_is_not_waited_for_after_messages_and_outputs_are_freed_once_they_are_sent(
    folder: Path, vpp: int, freed: bool
) -> None:
    config = _config(folder, ParallelLayout(world=2, pp=2, vpp=vpp))
    assert (config.batch_p2p_sync, config.deallocate_pipeline_outputs) == (False, freed)


def test_a_model_of_meta_tensors_allocates_nothing_on_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert _config(folder, _ALONE).use_cpu_initialization is False
    with torch.device("meta"):
        assert _config(folder, _ALONE).use_cpu_initialization is True


def test_linears_with_fused_weight_gradients_use_them_where_they_have_buffers() -> None:
    from megatron_ads.models.build import fuse_weight_gradients

    def linear(*, trained: bool) -> torch.nn.Module:
        module = torch.nn.Linear(2, 2)
        module.fuse_wgrad_accumulation = False  # type: ignore[assignment]
        if trained:
            module.weight.main_grad = torch.zeros(2, 2)  # type: ignore[attr-defined]
        return module

    model = torch.nn.ModuleList([linear(trained=True), linear(trained=False), torch.nn.Linear(2, 2)])
    fuse_weight_gradients(model)
    assert [getattr(module, "fuse_wgrad_accumulation", None) for module in model] == [True, False, None]
