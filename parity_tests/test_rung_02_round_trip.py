"""Rung 2: a checkpoint that goes through Megatron's layout, or through a built model, comes back bit for bit.

A failure means that a slice is cut or joined in the wrong place, or that a value was rounded on the way. Tensors are
read back with the safetensors library, not with the project's own reader.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conversion.convert import convert, to_hf, to_shards
from conversion.sources import open_source
from conversion.to_hf import ExportDtype
from conversion.to_reference import reference_target
from megatron_ads.config.model import LayoutConfig
from megatron_ads.layout import ParallelLayout
from parity_tests import jobs
from parity_tests.checkpoints import DENSE, MIXTURES
from parity_tests.harness.hf_checkpoints import fp8_checkpoint
from parity_tests.harness.ranks import run_ranks
from parity_tests.jobs import PATIENCE, Job
from parity_tests.tolerances import record

Checkpoint = Callable[[str], Path]
LAYOUTS = {
    "one file": LayoutConfig(),
    "tp2 ep4 pp2": LayoutConfig(tp=2, ep=4, pp=2),
    "etp2 pp4": LayoutConfig(tp=2, etp=2, pp=4),
    "vpp2": LayoutConfig(pp=2, vpp=2),
}
DENSE_LAYOUTS = {"tp2 pp2": LayoutConfig(tp=2, pp=2)}


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Return the names whose tensors are not of the same type, shape and bits."""
    assert set(a) == set(b)
    return sorted(name for name in a if not _same_bits(a[name], b[name]))


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


CASES = [
    *((family, name) for family in MIXTURES for name in LAYOUTS),
    *((family, name) for family in DENSE for name in ("one file", "tp2 pp2")),
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_hf_to_shards_to_hf_keeps_every_bit(checkpoint: Checkpoint, tmp_path: Path, family: str, name: str) -> None:
    to_shards(checkpoint(family), tmp_path / "shards", (LAYOUTS | DENSE_LAYOUTS)[name])
    to_hf(tmp_path / "shards", tmp_path / "back")
    before = _tensors(checkpoint(family))
    assert _differing(before, _tensors(tmp_path / "back")) == []
    record(2, f"{family}: tensors equal bit for bit", len(before))


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("small-v3", {"world": 1}),
        ("small-v3", {"world": 4, "pp": 2, "ep": 2}),
        ("small-v3", {"world": 2, "tp": 2, "etp": 2}),
        ("qwen2-tied", {"world": 4, "pp": 2, "tp": 2}),
    ],
)
def test_hf_to_a_built_model_to_hf_keeps_every_bit(
    checkpoint: Checkpoint, tmp_path: Path, family: str, layout: dict[str, int]
) -> None:
    job = Job(folder=checkpoint(family), layout=ParallelLayout(**layout))
    run_ranks(job.layout.world, jobs.load_and_export, job, tmp_path / "shards", timeout=PATIENCE)
    to_hf(tmp_path / "shards", tmp_path / "back")
    assert _differing(_tensors(job.folder), _tensors(tmp_path / "back")) == []


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fp8_checkpoint(tmp_path_factory.mktemp("fp8") / "published")


def _export_like(published: Path, root: Path) -> dict[str, Tensor]:
    to_shards(published, root / "shards", LayoutConfig(tp=2, ep=4, pp=2))
    convert(reference_target(open_source(root / "shards"), root / "back", published, ExportDtype.STORED))
    return _tensors(root / "back")


def test_fp8_comes_back_with_its_codes_and_scales(fp8: Path, tmp_path: Path) -> None:
    before = _tensors(fp8)
    assert _differing(before, _export_like(fp8, tmp_path)) == []
    record(2, "FP8: codes and scales equal bit for bit", len(before))


def _dequantized(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Multiply every code by the scale of its block, spread over the block, as the published script does."""
    result = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if (scale := tensors.get(name + "_scale_inv")) is not None:
            spread = scale.repeat_interleave(128, 0)[: tensor.size(0)].repeat_interleave(128, 1)[:, : tensor.size(1)]
            result[name] = (tensor.float() * spread).bfloat16()
        else:
            result[name] = tensor
    return result


def test_fp8_becomes_the_bf16_that_the_published_script_gives(fp8: Path, tmp_path: Path) -> None:
    to_shards(fp8, tmp_path / "shards", LayoutConfig(pp=2))
    to_hf(tmp_path / "shards", tmp_path / "back", dtype=ExportDtype.BF16)
    assert _differing(_dequantized(_tensors(fp8)), _tensors(tmp_path / "back")) == []


def test_a_scale_rounded_to_bf16_is_seen(fp8: Path, tmp_path: Path) -> None:
    wrong = shutil.copytree(fp8, tmp_path / "wrong")
    for file in wrong.glob("*.safetensors"):
        tensors = load_file(file)
        rounded = {name: t.bfloat16().float() if "_scale_inv" in name else t for name, t in tensors.items()}
        save_file(rounded, file, metadata={"format": "pt"})
    to_shards(wrong, tmp_path / "shards", LayoutConfig(pp=2))
    to_hf(tmp_path / "shards", tmp_path / "back", dtype=ExportDtype.BF16)
    assert len(_differing(_dequantized(_tensors(fp8)), _tensors(tmp_path / "back"))) > 10


def test_gate_and_up_joined_in_the_wrong_order_are_seen(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("small-v3")
    source = open_source(folder)
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    right = source.parameter(name)
    swapped = replace(right, parts=right.parts[::-1])
    rows = [_tensors(folder)[part.name] for part in swapped.parts]
    assert not torch.equal(source.read(name), torch.cat(rows))
    assert torch.equal(source.read(name), torch.cat(rows[::-1]))


def test_queries_keys_and_values_joined_one_after_the_other_are_seen(checkpoint: Checkpoint) -> None:
    folder = checkpoint("qwen2")
    tensors, source = _tensors(folder), open_source(folder)
    for kind in ("weight", "bias"):
        parts = [tensors[f"model.layers.1.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
        read = source.read(f"decoder.layers.1.self_attention.linear_qkv.{kind}")
        groups = [part.chunk(2) for part in parts]  # two key-value heads
        assert torch.equal(read, torch.cat([part[group] for group in (0, 1) for part in groups]))
        assert not torch.equal(read, torch.cat(parts))
