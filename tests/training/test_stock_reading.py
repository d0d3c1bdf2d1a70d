"""Stock ``megatron.core.dist_checkpointing`` reads the model part of our checkpoints, into models of its own making."""

from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.convert import lay_out
from conversion.sources import open_source
from parity_tests.harness.ranks import run_ranks
from parity_tests.harness.training_jobs import Recipe, run_steps, save, start
from tests.models.checkpoints import V3, write_checkpoint

Piece = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]
"""Key, shape of the whole tensor, where this piece of it begins, and the piece."""


def _pieces(models: list[Any]) -> list[Piece]:
    """Return what a rank has of each tensor of the format, in stock code's own description."""
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories

    state = {index: _described(model) for index, model in enumerate(models)}
    apply_factories(state)
    entries = [entry for entry in nested_values(state) if isinstance(entry, ShardedTensor)]
    return [
        (entry.key, entry.global_shape, entry.global_offset, entry.data.detach().clone().reshape(_block(entry)))
        for entry in entries
    ]


def _described(model: Any) -> dict[str, Any]:
    from megatron.core import parallel_state

    replicas = parallel_state.get_data_parallel_group(with_context_parallel=True)
    described: dict[str, Any] = model.sharded_state_dict(metadata={"dp_cp_group": replicas})
    return described


def _block(entry: Any) -> tuple[int, ...]:
    """Return the piece's shape with a 1 for every dimension that the format adds in front, as for experts."""
    return (1,) * entry.prepend_axis_num + tuple(entry.local_shape)[-entry.data.dim() :]


def _whole_tensors(pieces: list[Piece]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for key, shape, offset, piece in pieces:
        target = whole.setdefault(key, torch.full(shape, torch.nan, dtype=piece.dtype))
        target[tuple(slice(first, first + size) for first, size in zip(offset, piece.shape, strict=True))] = piece
    return whole


def _train_and_save(recipe: Recipe) -> list[Piece]:
    model, shards, source = start(recipe)
    run_steps(model, shards, 0, 1)
    save(recipe, model, shards, source)
    return _pieces(model.models)


def _stock_model(recipe: Recipe) -> Any:
    """Build the same shape from Megatron-Core's own layer specs and classes on one rank."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.models.transformer_config import megatron_config
    from megatron_ads.runtime import process_groups

    shards = lay_out(open_source(recipe.folder).shape, recipe.config().layout, 1)
    process_groups.start(shards.layout)
    settings = ModelSettings.of(recipe.config().model)
    config = megatron_config(shards.shape, shards.layout, shards.placement, settings)
    spec = get_gpt_decoder_block_spec(config, use_transformer_engine=False)
    for layer in spec.layer_specs:
        # Its local attention cannot serve latent attention's two widths; it has no weights.
        layer.submodules.self_attention.submodules.core_attention = IdentityOp
    return GPTModel(
        config,
        spec,
        vocab_size=shards.shape.vocab_size,
        max_sequence_length=shards.shape.max_positions,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
        mtp_block_spec=get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False),
    )


def _load_into_stock_model(recipe: Recipe, checkpoint: Path) -> list[Piece]:
    """Load with stock calls alone."""
    from megatron.core import dist_checkpointing

    model = _stock_model(recipe)
    for parameter in model.parameters():
        parameter.data.fill_(torch.nan)
    state = dist_checkpointing.load({"model": _described(model)}, str(checkpoint))
    model.load_state_dict(state["model"])
    return _pieces([model])


@pytest.mark.parametrize("spec", ["local", "grouped"])
def test_a_stock_model_takes_every_weight_of_a_checkpoint_of_pp_2_ep_2(spec: str, tmp_path: Path) -> None:
    recipe = Recipe(
        folder=write_checkpoint(tmp_path / "v3", V3),
        layout={"pp": 2, "ep": 2},
        model={"layer_spec": spec},
        checkpoints=tmp_path / "checkpoints",
    )
    saved = _whole_tensors([piece for pieces in run_ranks(4, _train_and_save, recipe) for piece in pieces])
    alone = Recipe(folder=recipe.folder, model={"layer_spec": "local"})
    (pieces,) = run_ranks(1, _load_into_stock_model, alone, recipe.checkpoints / "step-00000001")
    loaded = _whole_tensors(pieces)
    assert "decoder.layers.2.mlp.experts.experts.linear_fc1.weight" in loaded
    assert loaded.keys() == saved.keys()
    for key, tensor in loaded.items():
        assert torch.equal(tensor, saved[key]), key
