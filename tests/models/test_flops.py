"""The count of floating-point operations against numbers worked out by hand."""

from dataclasses import replace

from conversion.published_models import published_file
from megatron_ads.architecture import GroupedQueryShape, LatentAttentionShape, ModelShape, read_model_shape
from megatron_ads.config.model import LoraConfig, LoraTarget, ModelConfig, Recompute
from megatron_ads.models.flops import flops_per_token, token_flops
from megatron_ads.models.parts import Lora

ATTENTION = LatentAttentionShape(q_lora_rank=3, kv_lora_rank=2, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=2)
TINY = ModelShape(
    model_type="deepseek_v3",
    vocab_size=10,
    hidden_size=4,
    num_layers=2,
    num_heads=2,
    dense_ffn_size=6,
    first_dense_layers=1,
    attention=ATTENTION,
    num_experts=8,
    num_shared_experts=1,
    expert_ffn_size=5,
    experts_per_token=2,
    num_expert_groups=1,
    groups_per_token=1,
    score_function="sigmoid",
    has_expert_bias=True,
    normalize_expert_weights=True,
    routed_scaling_factor=1.0,
    rope_theta=10000.0,
    rope_scaling=None,
    max_positions=64,
    rms_norm_eps=1e-6,
    mtp_layers=1,
)


def test_a_tiny_model_counted_by_hand() -> None:
    # multiply-adds of a token, attention: query 4*3 + 3*(2*4) = 36, down 4*(2+2) = 16, up 2*2*(2+2) = 16,
    # output (2*2)*4 = 16; scores and values at 7 tokens: 4 keys on average * 2 heads * (4 + 2) = 48; together 132
    attention = 132
    dense = 3 * 4 * 6
    mixture = 4 * 8 + (2 + 1) * 3 * 4 * 5
    head = 4 * 10
    multiply_adds = 2 * attention + dense + mixture + head
    assert multiply_adds == 264 + 72 + 212 + 40
    assert flops_per_token(TINY, 7) == 3 * 2 * multiply_adds


def test_multi_token_prediction_adds_its_layer_its_projection_and_the_head_again() -> None:
    extra = 132 + 212 + 2 * 4 * 4 + 4 * 10
    assert flops_per_token(TINY, 7, with_mtp=True) - flops_per_token(TINY, 7) == 3 * 2 * extra


def test_adapters_spare_the_gradients_of_the_weights() -> None:
    lora = Lora.of(ModelConfig(lora=LoraConfig(rank=1, targets=[LoraTarget.attention])))
    assert lora is not None
    plain = flops_per_token(TINY, 7)
    scores = 2 * 2 * 48  # both layers; no weight is in these
    # one value of A and of B for each side of a weight: 4 + 3, 3 + 8, 4 + 4, 2 + 8, 4 + 4 in both layers
    adapters = 2 * 2 * (7 + 11 + 8 + 10 + 8)
    assert flops_per_token(TINY, 7, lora=lora) == plain - (plain // 3 - scores) + 3 * adapters


def test_a_full_rank_query_is_one_product() -> None:
    # 4 * (2 * 4) = 32 in place of 36, in both layers
    full_rank = replace(TINY, attention=replace(ATTENTION, q_lora_rank=None))
    assert flops_per_token(TINY, 7) - flops_per_token(full_rank, 7) == 3 * 2 * 2 * 4


GROUPED_QUERY = replace(
    TINY,
    attention=GroupedQueryShape(num_groups=1, head_dim=2, qkv_bias=True, output_bias=False),
    first_dense_layers=2,
    num_experts=0,
    mtp_layers=0,
)


def test_a_dense_model_with_grouped_queries_counted_by_hand() -> None:
    # queries 4*(2*2) = 16, one key and one value head 4*2 each, output 4*4 = 16; scores and values at 7 tokens: 4 keys
    # on average * 2 query heads * (2 + 2) = 32; together 80 a layer; biases are no products
    assert flops_per_token(GROUPED_QUERY, 7) == 3 * 2 * (2 * (80 + 3 * 4 * 6) + 4 * 10)


def test_selective_recomputation_of_grouped_query_attention_repeats_the_feed_forwards() -> None:
    flops = token_flops(GROUPED_QUERY, range(2), outputs=1, seq_length=7, recompute=Recompute.selective)
    assert flops.recomputed == 2 * 2 * (3 * 4 * 6)


def test_671b_activates_37_billion_parameters() -> None:
    # arXiv:2412.19437: 37 B activated of 671 B. Every activated weight but the embedding (0.93 B) is in one product.
    shape = read_model_shape(published_file("deepseek_r1"))
    no_attention_scores = flops_per_token(shape, -1)  # a sample of -1 tokens has (S + 1) / 2 = 0 keys to look at
    assert 36.0e9 < no_attention_scores / 6 < 37.0e9
