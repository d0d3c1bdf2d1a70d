"""Where adapters go: checkpoints hold them alone, exports and live weights hold the model with them merged."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from conversion.sources import open_source
from megatron_ads.cli import main
from megatron_ads.config.model import LoraConfig
from megatron_ads.errors import CheckpointError, ConversionError
from megatron_ads.training.adapter_record import AdapterRecord, base_digest, require_same_adapters
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.real_job import RealJob, write_small_model
from parity_tests.harness.training_jobs import Losses, Recipe, batches, resume_and_train, run_steps, save, start
from tests.models.checkpoints import V3, write_checkpoint
from tests.models.test_hf_parity import LOGIT_TOLERANCE

TOKENS_BS = torch.randint(0, 128, (2, 48), generator=torch.Generator().manual_seed(3))
STEPS = 2
ROUNDING = 1e-7
"""A unit in the last place of weights around 1, in FP32; trained weights move by more than 10,000 times as much."""
MODEL: dict[str, Any] = {"lora": LoraConfig(rank=4, alpha=8), "mtp_loss_weight": 0.1}


def _train_save_train(recipe: Recipe) -> Losses:
    model, shards, source = start(recipe)
    run_steps(model, shards, 0, STEPS)
    save(recipe, model, shards, source)
    return run_steps(model, shards, STEPS, STEPS)


@pytest.fixture(scope="module", params=["fp32", "bf16"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Losses]:
    """A checkpoint after two steps, and the losses of the two steps behind it."""
    root = tmp_path_factory.mktemp(request.param)
    recipe = Recipe(
        folder=write_checkpoint(root / "v3", V3),
        layout={"pp": 2, "ep": 2},
        checkpoints=root / "checkpoints",
        steps=STEPS,
        model=MODEL | {"precision": request.param},
    )
    return recipe, run_ranks(4, _train_save_train, recipe)[0]


def _again(recipe: Recipe, **changes: Any) -> Recipe:
    settings = {"folder": recipe.folder, "layout": recipe.layout, "model": recipe.model} | changes
    return Recipe(checkpoints=recipe.checkpoints, steps=STEPS, **settings)


def test_resuming_on_the_same_layout_is_bit_equal(saved: tuple[Recipe, Losses]) -> None:
    recipe, straight = saved
    for losses in run_ranks(4, resume_and_train, recipe):
        assert losses == straight


@pytest.mark.parametrize("layout", [{"tp": 2, "etp": 2}, {"pp": 2, "vpp": 2}], ids=str)
def test_resuming_on_another_layout_continues_the_curve(layout: dict[str, int], saved: tuple[Recipe, Losses]) -> None:
    recipe, straight = saved
    tolerance = 1e-5 if recipe.model["precision"] == "fp32" else 2e-3
    resumed = run_ranks(2, resume_and_train, _again(recipe, layout=layout))[0]
    assert resumed.loss == pytest.approx(straight.loss, rel=tolerance)


def test_a_checkpoint_holds_the_adapters_alone(saved: tuple[Recipe, Losses]) -> None:
    from conversion.torch_dist_pickle import read_metadata

    (folder,) = (saved[0].checkpoints or Path()).glob("step-*")
    keys = [key for key in read_metadata(folder / ".metadata").state_dict_metadata if not key.startswith("rng")]
    assert len(keys) > 100
    assert [key for key in keys if not key.endswith(("lora_a", "lora_b"))] == []
    with pytest.raises(ConversionError, match="holds low-rank adapters without the weights they adapt"):
        open_source(folder)


def _refusal(recipe: Recipe) -> str:
    with pytest.raises(CheckpointError) as refused:
        resume_and_train(recipe)
    return str(refused.value)


def test_a_checkpoint_of_adapters_to_another_model_is_refused(saved: tuple[Recipe, Losses], tmp_path: Path) -> None:
    other_base = write_checkpoint(tmp_path / "other", V3, seed=1)
    (message,) = run_ranks(1, _refusal, _again(saved[0], layout={}, folder=other_base))
    assert "holds adapters to other weights than model.load has" in message


RECORD = AdapterRecord(rank=4, scale=2.0, targets=("attention",), with_mtp=True, base="0a")
REFUSED = {
    "holds adapters, but model.lora.rank is unset": (RECORD, None),
    "holds the whole model, but model.lora.rank is set to 4": (None, RECORD),
    "adapters with model.lora.rank: 4 instead of 2, model.lora.alpha / model.lora.rank: 2.0 instead of 4.0": (
        RECORD,
        replace(RECORD, rank=2, scale=4.0),
    ),
    "model.lora.targets: ['attention'] instead of ['dense']": (RECORD, replace(RECORD, targets=("dense",))),
    "model.mtp_loss_weight above 0: True instead of False": (RECORD, replace(RECORD, with_mtp=False, base="0b")),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_checkpoint_of_other_adapters_is_refused(message: str) -> None:
    saved, wanted = REFUSED[message]
    stored = None if saved is None else json.loads(json.dumps(saved.as_json()))
    require_same_adapters(Path("step-1"), stored, saved)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        require_same_adapters(Path("step-1"), stored, wanted)


def test_the_digest_of_the_weights_is_that_of_every_format_and_of_no_other_model(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "v3", V3)
    assert main(["convert", "to-megatron", str(folder), str(tmp_path / "shards"), "--tp", "2", "--ep", "4"]) == 0
    other = write_checkpoint(tmp_path / "other", V3, seed=1)
    own, shards, others = (
        base_digest(open_source(path), torch.bfloat16) for path in (folder, tmp_path / "shards", other)
    )
    assert own == shards != others


def _resumed_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    from megatron_ads.training.checkpoint import complete_checkpoints, load_checkpoint
    from megatron_ads.training.weight_sync import WeightSync

    model, shards, source = start(recipe)
    ((_, folder),) = complete_checkpoints(recipe.checkpoints or Path())
    load_checkpoint(folder, model.chunks, model.optimizer, shards.layout, adapters=model.adapters)
    return {name: tensor.clone() for name, tensor in WeightSync(shards, source).tensors(model.models, model.spec)}


def test_live_weights_are_merged_and_the_same_under_every_layout(saved: tuple[Recipe, Losses]) -> None:
    recipe, _ = saved
    (whole,) = run_ranks(1, _resumed_weights, _again(recipe, layout={}))
    parts, *_ = run_ranks(2, _resumed_weights, _again(recipe, layout={"tp": 2, "etp": 2}))
    base = open_source(recipe.folder).container.tensors  # type: ignore[attr-defined]
    assert whole.keys() == parts.keys() == base.keys()
    for name in whole:
        kept_wide = name.endswith("e_score_correction_bias") or recipe.model["precision"] == "fp32"
        assert whole[name].dtype is parts[name].dtype is (torch.float32 if kept_wide else torch.bfloat16), name
    # The product of the factors is computed in slices there: its FP32 sums over the rank may round otherwise.
    apart = {name: (whole[name] - parts[name]).abs().max().item() for name in whole}
    assert {name: gap for name, gap in apart.items() if gap > ROUNDING} == {}
    trained = [(whole[name] - base[name].read().to(whole[name].dtype)).abs().max().item() for name in whole]
    assert max(trained) > 1e4 * ROUNDING
    changed = {name for name in whole if not torch.equal(whole[name], base[name].read().to(whole[name].dtype))}
    projections = {name for name in whole if "_proj" in name and "eh_proj" not in name}
    always_trained = {name for name in projections if ".mlp.experts." not in name}  # some experts get no token
    assert always_trained < changed <= projections
    assert len(always_trained) > 30


def _train_and_export(recipe: Recipe, export: Path) -> tuple[torch.Tensor, dict[str, tuple[torch.Tensor, ...]]]:
    """Return the logits with the adapters not merged, and A and B by the name of the weight."""
    from megatron_ads.models.lora import named_adapters
    from megatron_ads.training.export import export_shards
    from megatron_ads.training.step import run_step

    model, shards, source = start(recipe)
    for step in range(3):
        run_step(batches(128, step, shards.layout), model.chunks, model.optimizer, learning_rate=3e-2)
    export_shards(export, model.models, model.spec, source, shards)
    factors = {
        weight.name: (adapter.a_NRI[index].detach(), adapter.b_NPOR[index].detach().flatten(0, 1))
        for _, adapter in named_adapters(model.models[0])
        for index, weight in enumerate(adapter.weights)
    }
    with torch.no_grad():
        positions_BS = torch.arange(TOKENS_BS.size(1)).expand(TOKENS_BS.shape)
        return model.models[0].eval()(TOKENS_BS, positions_BS, None), factors


@pytest.mark.parametrize("spec", ["local", "grouped"])
def test_an_export_is_the_formula_bit_by_bit_and_transformers_computes_the_same_from_it(
    spec: str, tmp_path: Path
) -> None:
    folder, shards, hf = write_checkpoint(tmp_path / "v3", V3), tmp_path / "shards", tmp_path / "hf"
    recipe = Recipe(folder=folder, model=MODEL | {"layer_spec": spec})
    ((logits, factors),) = run_ranks(1, _train_and_export, recipe, shards)
    base, exported = open_source(folder), open_source(shards)
    assert len(factors) == 5 * 5 + 2 * 2 + 3 * (2 + 64 * 2)  # attention, dense layers, shared and routed experts
    for name in base.names():
        expected = base.read(name)
        if name in factors:
            a_RI, b_OR = factors[name]
            expected = expected + (8 / 4) * (b_OR @ a_RI)
        assert torch.equal(exported.read(name), expected), name
    assert main(["convert", "to-hf", str(shards), str(hf)]) == 0
    with torch.no_grad():
        theirs = DeepseekV3ForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()(TOKENS_BS).logits
        before = DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(TOKENS_BS).logits
    assert float((logits - theirs).abs().max()) < LOGIT_TOLERANCE
    assert float((logits - before).abs().max()) > 1000 * LOGIT_TOLERANCE


def test_a_job_of_adapters_that_is_taken_up_again_exports_what_one_in_a_piece_does(tmp_path: Path) -> None:
    model = write_small_model(tmp_path / "model")
    settings: dict[str, Any] = {
        "model": model,
        "ranks": 1,
        "layout": {"pp": 1, "ep": 1},
        # Another schedule than cosine: that one depends on the last step.
        "overrides": ["model.lora.rank=2", "optim=adamw_constant"],
    }
    whole = RealJob(root=tmp_path / "whole", steps=4, **settings)
    begun, taken_up = (RealJob(root=tmp_path / "parts", steps=steps, **settings) for steps in (2, 4))
    for job in (whole, begun, taken_up):
        job.run_to_end(forked=True)
    # Begun anew, the second would have been refused: it would have saved step 2 once more.
    assert taken_up.complete() == ["step-00000002", "step-00000004"]
    assert taken_up.losses() == whole.losses()
    assert taken_up.weights() == whole.weights()
    name = "decoder.layers.0.mlp.linear_fc1.weight"
    assert not torch.equal(open_source(whole.root / "export").read(name), open_source(model).read(name))
