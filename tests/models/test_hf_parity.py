"""The logits of each model family against transformers, the independent implementation."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2ForCausalLM, DeepseekV3ForCausalLM

from conversion.layer_specs import LayerSpec
from parity_tests.harness.model_jobs import Job, logits
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import KIMI_K2, MOONLIGHT, V2_LITE, V3, write_checkpoint

LOGIT_TOLERANCE = 1e-5
"""FP32 over four layers of width 64, logits up to 5: sums in another order differ by 1e-6."""

FAMILIES = {"v3": V3, "v2_lite": V2_LITE, "moonlight": MOONLIGHT, "kimi_k2": KIMI_K2}


def _reference(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    model_class = (
        DeepseekV2ForCausalLM if "deepseek_v2" in (folder / "config.json").read_text() else DeepseekV3ForCausalLM
    )
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        return model.eval()(tokens_BS).logits


def _difference(folder: Path, spec: LayerSpec) -> float:
    tokens_BS = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(3))
    (ours,) = run_ranks(1, logits, Job(folder=folder, settings={"spec": spec}), tokens_BS)
    return float((ours - _reference(folder, tokens_BS)).abs().max())


@pytest.mark.parametrize("spec", [LayerSpec.LOCAL, LayerSpec.GROUPED])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_those_of_transformers(tmp_path: Path, family: str, spec: LayerSpec) -> None:
    folder = write_checkpoint(tmp_path / "hf", FAMILIES[family])
    assert _difference(folder, spec) < LOGIT_TOLERANCE


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("v3", {"n_group": 1, "topk_group": 1}),
        ("v3", {"routed_scaling_factor": 2.4}),
        ("v3", {"rope_scaling": None}),
        ("v2_lite", {"num_experts_per_tok": 5}),
        ("moonlight", {"rope_theta": 10000.0}),
    ],
    ids=["group limits", "scaling factor", "yarn", "chosen experts", "rope base"],
)
def test_logits_differ_when_a_number_of_the_shape_is_wrong(tmp_path: Path, family: str, wrong: dict[str, Any]) -> None:
    tokens_BS = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(3))
    right = write_checkpoint(tmp_path / "right", FAMILIES[family])
    other = write_checkpoint(tmp_path / "wrong", FAMILIES[family] | wrong)
    (ours,) = run_ranks(1, logits, Job(folder=other), tokens_BS)
    assert float((ours - _reference(right, tokens_BS)).abs().max()) > 10 * LOGIT_TOLERANCE
