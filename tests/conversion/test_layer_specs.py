"""The names of each layer spec lead to the same canonical parameters."""

import pytest

from conversion.layer_specs import LayerSpec, canonical_names
from megatron_ads.errors import ConversionError

EXPERTS = range(4, 8)
"""This rank's routed experts: the second half of eight."""


@pytest.mark.parametrize(
    ("spec", "parameter", "expected"),
    [
        (LayerSpec.LOCAL, "embedding.word_embeddings.weight", ("embedding.word_embeddings.weight",)),
        (
            LayerSpec.LOCAL,
            "decoder.layers.1.mlp.experts.local_experts.2.linear_fc1.weight",
            ("decoder.layers.11.mlp.experts.linear_fc1.weight6",),
        ),
        (
            LayerSpec.GROUPED,
            "decoder.layers.0.mlp.experts.weight2",
            tuple(f"decoder.layers.10.mlp.experts.linear_fc2.weight{expert}" for expert in (4, 5, 6, 7)),
        ),
        (
            LayerSpec.TE,
            "decoder.layers.0.mlp.experts.linear_fc2.weight3",
            ("decoder.layers.10.mlp.experts.linear_fc2.weight7",),
        ),
        (
            LayerSpec.TE,
            "decoder.layers.0.self_attention.linear_q_up_proj.layer_norm_weight",
            ("decoder.layers.10.self_attention.q_layernorm.weight",),
        ),
        (
            LayerSpec.TE,
            "decoder.layers.0.mlp.linear_fc1.layer_norm_weight",
            ("decoder.layers.10.pre_mlp_layernorm.weight",),
        ),
        (
            LayerSpec.GROUPED,
            "mtp.layers.0.transformer_layer.mlp.experts.weight1",
            tuple(f"mtp.layers.0.transformer_layer.mlp.experts.linear_fc1.weight{expert}" for expert in (4, 5, 6, 7)),
        ),
    ],
)
def test_module_names_become_global(spec, parameter, expected):
    assert canonical_names(parameter, spec=spec, first_layer=10, local_experts=EXPERTS) == expected


def test_an_expert_beyond_this_rank_is_refused():
    with pytest.raises(ConversionError, match="local expert 4, but this rank holds 4 experts"):
        canonical_names(
            "decoder.layers.0.mlp.experts.local_experts.4.linear_fc1.weight",
            spec=LayerSpec.LOCAL,
            first_layer=0,
            local_experts=EXPERTS,
        )
