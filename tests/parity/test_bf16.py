"""BF16 is judged apart from tokens that go to other experts: right models pass at any length, planted errors do not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from megatron_ads import cli
from megatron_ads.demo_model import write_demo_model
from parity_tests.harness.family import MEMBERS
from parity_tests.harness.ranks import run_ranks

MODELS: dict[str, dict[str, Any]] = {
    "groups": MEMBERS["DeepSeek-V3"].config | {"initializer_range": 0.1},
    "no groups": MEMBERS["DeepSeek-V3"].config
    | {"initializer_range": 0.05, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
}
LENGTHS = (24, 48, 96, 256)


def reports(folder: Path, out: Path, others: Sequence[Path | None], lengths: Sequence[int]) -> list[dict[str, Any]]:
    """Return the report of every length for every checkpoint in place of ``folder`` on our side."""
    found = []
    for other in others:
        for tokens in lengths:
            words = ["parity", "--hf", str(folder), "--precision", "bf16", "--tokens", str(tokens), "--out", str(out)]
            cli.main([*words, *(["--megatron", str(other)] if other else [])])
            found.append(json.loads((out / "parity.json").read_text()))
    return found


def _failed(report: dict[str, Any]) -> list[int]:
    return [one["rung"] for one in report["rungs"] if one["passed"] is False]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", MODELS)
def test_a_right_model_passes_at_any_length(name: str, seed: int, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", MODELS[name], seed=seed)
    (found,) = run_ranks(
        1, reports, tmp_path / "model", tmp_path / "out", [None], LENGTHS, process_group=False, timeout=240
    )
    assert [_failed(report) for report in found] == [[]] * len(LENGTHS)
    assert any(report["logits"]["rerouted"] for report in found), "nothing was rerouted: the test shows nothing"


@pytest.mark.parametrize(
    ("weight", "rung"),
    [
        ("model.layers.2.mlp.shared_experts.down_proj.weight", 3),
        ("model.layers.1.self_attn.o_proj.weight", 3),
        ("model.norm.weight", 3),
        ("model.layers.2.mlp.gate.weight", 4),
        ("model.layers.3.self_attn.o_proj.weight", 6),
        ("model.layers.3.mlp.gate.weight", 6),
    ],
)
def test_one_wrong_weight_fails_its_rung(weight: str, rung: int, tmp_path: Path) -> None:
    write_demo_model(tmp_path / "model", MODELS["groups"])
    write_demo_model(tmp_path / "wrong", MODELS["groups"])
    for file in (tmp_path / "wrong").glob("*.safetensors"):
        tensors = load_file(file)
        if weight in tensors:
            tensors[weight] = tensors[weight].flip(0) if weight.endswith("gate.weight") else tensors[weight] * 1.2
            save_file(tensors, file, metadata={"format": "pt"})
    (found,) = run_ranks(
        1, reports, tmp_path / "model", tmp_path / "out", [tmp_path / "wrong"], [24, 128], process_group=False
    )
    assert all({2, rung} <= set(_failed(report)) for report in found), [_failed(report) for report in found]
