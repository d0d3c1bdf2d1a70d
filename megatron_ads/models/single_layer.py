"""One decoder or MTP layer of a model by itself, on one rank, loaded from any checkpoint.

For checks that stream through a model larger than memory. Shape suffixes: S = tokens, C = hidden width, T = tokens.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from conversion.layer_specs import canonical_names
from conversion.sources import WeightSource
from megatron_ads.architecture import GroupedQueryShape
from megatron_ads.layout import Chunk, ParallelLayout, place_layers
from megatron_ads.models.attention import set_latent_norm_epsilon
from megatron_ads.models.grouped_query import rotary_angles
from megatron_ads.models.settings import ModelSettings
from megatron_ads.models.specs import RMSNorm, decoder_spec, mtp_spec
from megatron_ads.models.transformer_config import megatron_config
from megatron_ads.models.weights import NamedWeight, model_tensors

Router = Callable[[Tensor, Tensor], None]
"""Takes the weights (T, E) and the chosen experts (T, E) of one pass."""


class SingleLayer:
    """Layer ``layer`` of a model (numbers from ``num_layers`` on: the MTP layers), without autograd.

    Megatron's process groups must exist, for one rank.
    """

    @torch.no_grad()
    def __init__(self, source: WeightSource, layer: int, settings: ModelSettings) -> None:
        """Build the layer and fill it."""
        self._shape = shape = source.shape
        self.config = _config(source, settings)
        mtp = layer - shape.num_layers
        self.is_mtp = mtp >= 0
        layers, mtp_layers = ((), (mtp,)) if self.is_mtp else ((layer,), ())
        chunk = Chunk(stage=0, virtual=0, layers=layers, has_embedding=False, has_loss=False, mtp_layers=mtp_layers)
        found = mtp_spec(shape, chunk, settings.spec) if self.is_mtp else decoder_spec(shape, chunk, settings.spec)
        assert found is not None and found.layer_specs is not None
        self._module = build_module(
            found.layer_specs[0],
            config=self.config,
            layer_number=(mtp if self.is_mtp else layer) + 1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ).eval()
        set_latent_norm_epsilon(self._module)
        prefix, experts = f"mtp.layers.{mtp}" if self.is_mtp else "decoder.layers.0", range(shape.num_experts)
        for name, tensor in model_tensors(self._module):
            full = f"{prefix}.{name}"
            canonical = canonical_names(full, spec=settings.spec, first_layer=layer, local_experts=experts)
            for piece, target in NamedWeight(full, canonical, tensor, ".mlp.experts." in name).pieces():
                target.copy_(source.read(piece))

    @torch.no_grad()
    def decode(self, hidden_SC: Tensor) -> Tensor:
        positions: dict[str, Tensor] = {}
        if isinstance(self._shape.attention, GroupedQueryShape):  # latent attention makes its own
            positions = {"rotary_pos_emb": rotary_angles(self._shape, len(hidden_SC), hidden_SC.device)}
        output, _ = self._module(hidden_states=hidden_SC[:, None], attention_mask=None, **positions)
        return output[:, 0]

    @torch.no_grad()
    def predict(self, tokens_S: Tensor, hidden_SC: Tensor, embed: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output of an MTP layer, behind its norm, for one row and the model's output for it.

        ``embed`` turns tokens (S,) into (S, C). Token 0 follows the last token.
        """
        output, *_ = self._module(
            input_ids=tokens_S[None],
            position_ids=torch.arange(len(tokens_S), device=tokens_S.device)[None],
            hidden_states=hidden_SC[:, None],
            attention_mask=None,
            embedding=lambda input_ids, position_ids: embed(input_ids[0])[:, None],
        )
        return output[:, 0]

    def watch_router(self, router: Router) -> None:
        """Have ``router`` called after every pass of a layer with experts."""
        for name, module in self._module.named_modules():
            if name.endswith("mlp.router"):
                module.register_forward_hook(lambda _module, _inputs, output: router(*output))


def build_norm(source: WeightSource, name: str, settings: ModelSettings) -> RMSNorm:
    """Return one of the norms outside the layers, by canonical name without ``.weight``, filled."""
    norm = RMSNorm(_config(source, settings), source.shape.hidden_size, source.shape.rms_norm_eps)
    with torch.no_grad():
        norm.weight.copy_(source.read(f"{name}.weight"))
    return norm


def _config(source: WeightSource, settings: ModelSettings) -> TransformerConfig:
    layout = ParallelLayout(world=1)
    return megatron_config(source.shape, layout, place_layers(source.shape, layout), settings)
