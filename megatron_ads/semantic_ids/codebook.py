"""A fitted quantizer: from items to codes, with the text embedding that it was fitted on, if it was one.

Shape suffixes: N = items, D = dimensions of an embedding, L = levels, W = words.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.config.semantic_ids import Quantizer, SemanticIdConfig
from megatron_ads.errors import DataError
from megatron_ads.metrics.encoder import sentence_encoder
from megatron_ads.metrics.text import TextEmbedding, fit_embedding
from megatron_ads.semantic_ids import rqvae
from megatron_ads.semantic_ids.items import Items, Vectors
from megatron_ads.semantic_ids.residual import quantize, residual_kmeans
from megatron_ads.semantic_ids.rqvae import RqVae, fit_rqvae

_ROWS = 1 << 16
"""Items that are quantized at a time."""
_TEXTS = 1 << 13
"""Texts that are embedded at a time: TF-IDF makes a dense row of each."""
_MOST_TEXTS = 20_000
"""TF-IDF is fitted on; of more, every second, third, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Codebook:
    """What gives items their codes. Vectors are moved by ``mean_D`` and divided by ``scale`` first."""

    config: SemanticIdConfig
    text: TextEmbedding | None
    """TF-IDF that was fitted with it; None: vectors are given, or made by ``config.encoder``."""
    given_vectors: bool
    """Whether it was fitted on vectors that came with the items."""
    mean_D: Tensor
    scale: float
    quantizer: RqVae | tuple[Tensor, ...]
    """An RQ-VAE, or the codes of each level, (C, D)."""

    def vectors(self, items: Items) -> Vectors:
        """Return the vector of each item, (N, D).

        Raises:
            ConfigError: If the encoder cannot be loaded.
            DataError: If the items have vectors and the codebook is of texts, or the other way round, or their length
                is another.
        """
        if self.given_vectors != (items.vector_ND is not None):
            raise DataError(
                f"The codebook was fitted on {'given vectors' if self.given_vectors else 'texts of items'}, and the "
                f"items come {'without' if self.given_vectors else 'with'} vectors. Give both alike (--vectors)."
            )
        vector_ND = items.vector_ND if items.vector_ND is not None else _embedded(items.texts, self.text, self.config)
        if vector_ND.shape[1] != len(self.mean_D):
            raise DataError(
                f"Items have vectors of {vector_ND.shape[1]} numbers, and the codebook was fitted on "
                f"{len(self.mean_D)}. Give those of the same encoder."
            )
        return vector_ND

    def encode(self, vector_ND: Vectors) -> tuple[NDArray[np.int64], float]:
        """Return the codes of each vector, (N, L), and the relative reconstruction error.

        That is ``sum |x - x'|^2 / sum |x - mean|^2``: 0 reconstructs everything, 1 nothing but the mean.
        """
        codes, lost, spread = [], 0.0, 0.0
        for start in range(0, len(vector_ND), _ROWS):
            x_ND = (torch.from_numpy(vector_ND[start : start + _ROWS]) - self.mean_D) / self.scale
            code_NL, rebuilt_ND = self._encode(x_ND)
            codes.append(code_NL.numpy())
            lost += float((x_ND - rebuilt_ND).double().square().sum())
            spread += float(x_ND.double().square().sum())
        return np.concatenate(codes), lost / spread if spread else 0.0

    def _encode(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        if isinstance(self.quantizer, RqVae):
            return rqvae.encode(self.quantizer, x_ND)
        return quantize(x_ND, self.quantizer)


def fit_codebook(items: Items, config: SemanticIdConfig) -> Codebook:
    """Return a codebook fitted on all ``items``.

    Raises:
        ConfigError: If the encoder cannot be loaded.
        DataError: If there are fewer items than codes of a level, or all have the same vector.
    """
    if len(items.ids) < config.codes:
        raise DataError(
            f"There are {len(items.ids)} items, fewer than sid.codes = {config.codes} of a level. Lower it, or give "
            "more items."
        )
    of_texts = items.vector_ND is None and config.encoder is None
    some = items.texts[:: -(-len(items.texts) // _MOST_TEXTS)]
    text = fit_embedding(some, dimensions=config.dimensions) if of_texts else None
    vector_ND = items.vector_ND if items.vector_ND is not None else _embedded(items.texts, text, config)
    x_ND = torch.from_numpy(vector_ND)
    mean_D = x_ND.mean(0)
    scale = float((x_ND - mean_D).square().mean().sqrt())
    if scale == 0.0:
        raise DataError(f"All {len(items.ids)} items have the same vector. Give texts or vectors that differ.")
    x_ND = (x_ND - mean_D) / scale
    quantizer: RqVae | tuple[Tensor, ...]
    if config.quantizer is Quantizer.rqvae:
        quantizer = fit_rqvae(x_ND, config)
    else:
        quantizer = tuple(residual_kmeans(x_ND, levels=config.levels, codes=config.codes, seed=config.seed))
    return Codebook(
        config=config,
        text=text,
        given_vectors=items.vector_ND is not None,
        mean_D=mean_D,
        scale=scale,
        quantizer=quantizer,
    )


def _embedded(texts: tuple[str, ...], text: TextEmbedding | None, config: SemanticIdConfig) -> Vectors:
    embed = text.embed if text is not None else sentence_encoder(config.encoder or "", "sid.encoder")
    found = [embed(texts[start : start + _TEXTS]).astype(np.float32) for start in range(0, len(texts), _TEXTS)]
    return np.concatenate(found)
