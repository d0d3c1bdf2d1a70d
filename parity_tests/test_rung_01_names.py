"""Rung 1: every Hugging Face tensor is consumed once and every Megatron parameter is filled once.

A failure means that the table in ``conversion/names.py``, the layer spec or the layout disagrees with the checkpoint
or with the modules that Megatron-Core really builds; no number can be trusted before it is mended.
"""

import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.names import hf_aliases, parameters
from conversion.rank_files import RankFile, ShardsLayout
from conversion.sources import open_source
from megatron_ads.architecture import read_model_shape
from megatron_ads.errors import ConversionError
from megatron_ads.layout import ParallelLayout, place_layers
from parity_tests.checkpoints import FAMILIES, SMALL_V3, altered_copy, write_checkpoint
from parity_tests.harness.ranks import run_ranks
from parity_tests.jobs import names_by_rank
from parity_tests.tolerances import record

Checkpoint = Callable[[str], Path]
DEEP = SMALL_V3 | {"num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 16, "n_group": 8}
"""61 layers as the published model has, with two experts a group."""
LAYOUTS: dict[str, tuple[ParallelLayout, str | None]] = {
    "one process": (ParallelLayout(world=1), None),
    "pp2 ep4": (ParallelLayout.smallest(pp=2, ep=4), None),
    "tp2 etp2 pp4": (ParallelLayout.smallest(tp=2, etp=2, pp=4), None),
    "pp2 vpp2": (ParallelLayout.smallest(pp=2, vpp=2), None),
    "embedding and loss alone": (ParallelLayout.smallest(pp=4, ep=2), "E|tt|tt|mL"),
}
SPECS = [
    LayerSpec.LOCAL,
    LayerSpec.GROUPED,
    pytest.param(
        LayerSpec.TE,
        marks=pytest.mark.skipif(
            importlib.util.find_spec("transformer_engine") is None, reason="transformer-engine is not installed"
        ),
    ),
]


def _stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_hf_tensor_is_consumed_once(checkpoint: Checkpoint, family: str) -> None:
    folder = checkpoint(family)
    shape = read_model_shape(folder)
    consumed = Counter(part.name for parameter in parameters(shape).values() for part in parameter.parts)
    assert set(consumed.values()) == {1}
    assert set(consumed) | set(hf_aliases(shape)) == _stored_names(folder)
    record(1, f"{family}: HF tensors consumed once", len(consumed))


def _faults(folder: Path, layout: ParallelLayout, pipeline: str | None, spec: LayerSpec) -> list[str]:
    """Return where what the modules of every rank hold is not, once each, what the conversion gives that rank."""
    shape = read_model_shape(folder)
    plan = ShardsLayout(shape=shape, layout=layout, placement=place_layers(shape, layout, pipeline=pipeline))
    (held,) = run_ranks(1, names_by_rank, folder, layout, pipeline, spec, process_group=False)
    assert len(held) == layout.world
    found = []
    for rank, names in enumerate(held):
        at = layout.coordinates(rank)
        file = RankFile(pp=at.pp, tp=at.tp, ep=at.ep, etp=at.etp, etp_size=layout.etp)
        given = {parameter.name for parameter in plan.owned(file)}
        found += [f"rank {rank} holds {name} {count} times" for name, count in Counter(names).items() if count > 1]
        found += [f"rank {rank} holds or is given {name}, not both" for name in sorted(given ^ set(names))]
    everywhere = {name for names in held for name in names}
    return found + [f"no rank holds {name}" for name in sorted(parameters(shape).keys() - everywhere)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_every_parameter_that_megatron_builds_is_filled_once(
    checkpoint: Checkpoint, layout: tuple[ParallelLayout, str | None], spec: LayerSpec
) -> None:
    assert _faults(checkpoint("small-v3"), *layout, spec) == []


@pytest.mark.parametrize("family", ["v2-lite", "moonlight"])
def test_the_other_families_are_filled_once(checkpoint: Checkpoint, family: str) -> None:
    assert _faults(checkpoint(family), ParallelLayout.smallest(pp=2, ep=2), None, LayerSpec.GROUPED) == []


@pytest.mark.parametrize("spec", SPECS[1:])
@pytest.mark.parametrize("family", ["qwen2", "qwen2-tied", "llama"])
def test_dense_models_are_filled_once(checkpoint: Checkpoint, family: str, spec: LayerSpec) -> None:
    assert _faults(checkpoint(family), ParallelLayout.smallest(pp=2, vpp=2, tp=2), None, spec) == []


@pytest.mark.slow
def test_61_layers_on_31_stages_with_a_first_stage_without_experts_are_filled_once(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "deep", DEEP)
    layout = ParallelLayout.smallest(pp=31, ep=8)
    assert _faults(folder, layout, "Ett|(tt|)*29tmL", LayerSpec.GROUPED) == []
    record(1, "61 layers under pp 31 x ep 8: ranks whose parameters are filled once", layout.world)


def test_a_checkpoint_with_a_tensor_too_many_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    wrong = altered_copy(checkpoint("small-v3"), tmp_path / "wrong", config={"num_nextn_predict_layers": 0})
    with pytest.raises(ConversionError, match="no place for"):
        open_source(wrong)


def test_a_checkpoint_with_a_tensor_too_few_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    def without_a_norm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in tensors.items() if "layers.2.self_attn.kv_a_layernorm" not in name}

    wrong = altered_copy(checkpoint("small-v3"), tmp_path / "wrong", weights=without_a_norm)
    with pytest.raises(ConversionError, match=r"layers\.2\.self_attn\.kv_a_layernorm"):
        open_source(wrong)
