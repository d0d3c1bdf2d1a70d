"""What Megatron-Core does wrong or not at all, up to 0.19 or to the version that a test names.

Where a test here fails, a workaround in models/ can go.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conversion.layer_specs import LayerSpec
from conversion.sources import open_source
from megatron_ads.config.model import Recompute
from megatron_ads.layout import ParallelLayout, place_layers
from megatron_ads.runtime import process_groups
from megatron_ads.runtime.device import seed_everything
from megatron_ads.runtime.megatron_version import megatron_core_since
from parity_tests.harness import model_jobs
from parity_tests.harness.model_jobs import Job, own_slice, train_pass
from parity_tests.harness.ranks import run_ranks
from tests.models.checkpoints import V3, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("upstream") / "hf", V3)


def _key_value_gradient(folder: Path, layout: ParallelLayout, stock: bool) -> Tensor:
    """Return the gradient of one attention's key-value down-projection, for the same weights, input and loss."""
    process_groups.start(layout)
    seed_everything(1)
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention
    from megatron.core.transformer.spec_utils import build_module

    from megatron_ads.models import specs
    from megatron_ads.models.attention import attend
    from megatron_ads.models.settings import ModelSettings
    from megatron_ads.models.transformer_config import megatron_config

    class Core(torch.nn.Module):
        def __init__(self, softmax_scale: float, **_: Any) -> None:
            super().__init__()
            self.scale = softmax_scale

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
            heads = (x.permute(1, 2, 0, 3) for x in (query, key, value))
            return attend(*heads, scale=self.scale).permute(2, 0, 1, 3).flatten(2)

    shape = open_source(folder).shape
    config = megatron_config(shape, layout, place_layers(shape, layout), ModelSettings(spec=LayerSpec.LOCAL))
    spec = specs._layer(shape, LayerSpec.LOCAL, has_experts=False).submodules.self_attention
    if stock:
        spec.module, spec.submodules.core_attention = MLASelfAttention, Core
        assert spec.submodules.linear_kv_down_proj is ColumnParallelLinear
    module = build_module(spec, config=config, layer_number=1)
    rank, generator = layout.coordinates(torch.distributed.get_rank()).tp, torch.Generator().manual_seed(2)
    sizes = {"q_down": (24, 64), "q_up": (96, 24), "kv_down": (24, 64), "kv_up": (112, 16), "proj": (64, 48)}
    full = {name: torch.randn(size, generator=generator) * 0.2 for name, size in sizes.items()}
    hidden = torch.randn(8, 1, 64, generator=generator)
    with torch.no_grad():
        for name, weight in full.items():
            target = getattr(module, "linear_proj" if name == "proj" else f"linear_{name}_proj").weight
            target.copy_(own_slice(name, weight, target.shape, rank))
        for norm in (module.q_layernorm, module.kv_layernorm):
            norm.weight.fill_(1.0)
    output, _ = module(hidden.chunk(layout.tp)[rank].requires_grad_(), None)
    weights = torch.randn(8, 1, 64, generator=generator)
    (output * weights.chunk(layout.tp)[rank]).sum().backward()
    gradient = module.linear_kv_down_proj.weight.grad
    if gradient.shape == full["kv_down"].shape and layout.tp > 1:
        torch.distributed.all_reduce(gradient)  # as Megatron does for parameters marked sequence_parallel
    return gradient


def _key_value_error(folder: Path, stock: bool) -> float:
    (full,) = run_ranks(1, _key_value_gradient, folder, ParallelLayout(world=1), stock)
    parts = run_ranks(2, _key_value_gradient, folder, ParallelLayout(world=2, tp=2, etp=2), stock)
    errors = [(part - own_slice("down", full, part.shape, rank)).abs().max() for rank, part in enumerate(parts)]
    return float(max(errors) / full.abs().max())


def test_divided_down_projections_lose_gradient_under_tensor_parallelism(folder: Path) -> None:
    assert _key_value_error(folder, stock=True) > 0.01
    assert _key_value_error(folder, stock=False) < 1e-5


def test_batched_messages_between_two_interleaved_stages_compute_wrong_numbers(folder: Path) -> None:
    (alone,) = run_ranks(1, train_pass, Job(folder=folder))
    layout = ParallelLayout(world=2, pp=2, vpp=2)
    batched = {"overlap_p2p_comm": False, "batch_p2p_comm": True}
    losses = {
        name: sum(result.loss_sum for result in run_ranks(2, train_pass, Job(folder=folder, layout=layout, **changes)))
        for name, changes in {"ours": {}, "batched": {"config_changes": batched}}.items()
    }
    assert losses["ours"] == pytest.approx(alone.loss_sum, rel=1e-6)
    assert losses["batched"] != pytest.approx(alone.loss_sum, rel=1e-4)


def _stock_failures(job: Job) -> dict[str, str]:
    """Make the stock classes do what ours were written for; return what they say instead."""
    (model,), shape, _ = model_jobs.build(job)
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer

    row = model_jobs.rows(shape.vocab_size)[0]
    failures = {"recompute": "", "logits": ""}
    model.mtp.layers[0].__class__ = MultiTokenPredictionLayer
    try:
        model(row["tokens"], row["positions"], None, labels=row["labels"], packed_seq_params=model_jobs.packed(row))
    except TypeError as error:
        failures["recompute"] = str(error)
    model.__class__ = GPTModel
    try:
        model.eval()(row["tokens"], row["positions"], None)
    except AttributeError as error:
        failures["logits"] = str(error)
    try:
        DotProductAttention(model.config, 1, AttnMaskType.causal, "self", k_channels=24, v_channels=12)
    except TypeError as error:
        failures["attention"] = str(error)
    linear = ColumnParallelLinear(4, 4, config=model.config, init_method=None, bias=False)
    failures["marks"] = "absent" if not hasattr(linear.weight, "tensor_model_parallel") else "present"
    return failures


def test_stock_modules_still_cannot_do_what_ours_are_for(folder: Path) -> None:
    settings = {"mtp_loss_weight": 0.3, "recompute": Recompute.full}
    (failures,) = run_ranks(1, _stock_failures, Job(folder=folder, settings=settings))
    recompute = "" if megatron_core_since("0.18") else "save_for_backward can only save variables"
    assert recompute in failures["recompute"] and bool(recompute) == bool(failures["recompute"])  # models/specs.py
    logits = "" if megatron_core_since("0.17") else "'NoneType' object has no attribute 'clone'"
    assert logits in failures["logits"] and bool(logits) == bool(failures["logits"])  # models/specs.py
    assert "k_channels" in failures["attention"]  # models/attention.py
    marks = "present" if megatron_core_since("0.18") else "absent"
    assert failures["marks"] == marks  # _mark_weights in models/build.py
