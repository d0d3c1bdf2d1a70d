"""The settings of ``sid fit``: the quantizer that turns item embeddings into semantic IDs.

Importing this module needs no torch.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from megatron_ads.config.settings import load_settings
from megatron_ads.errors import require, require_above, require_at_least


class Quantizer(StrEnum):
    """How codes are found."""

    rqvae = "rqvae"
    """An autoencoder with a residual quantizer between encoder and decoder (TIGER, arXiv:2305.05065)."""
    rqkmeans = "rqkmeans"
    """k-means of the vectors, then of what each level leaves over; no encoder."""


@dataclass(kw_only=True, slots=True)  # not frozen: OmegaConf merges into it
class SemanticIdConfig:
    """A codebook of ``levels`` x ``codes``. The advertiser paper has 5 x 20248."""

    quantizer: Quantizer = Quantizer.rqvae
    """``rqvae`` or ``rqkmeans``."""
    levels: int = 3
    """Codes of an item; each level quantizes what the levels before it left over, the residual."""
    codes: int = 256
    """Of a level."""
    disambiguation_codes: int = 256
    """Items that share the codes of all levels are told apart by one more code; so many items may share them."""
    seed: int = 0
    """Of first weights, first centroids and order."""
    encoder: str | None = None
    """Model of sentence-transformers that embeds items' texts, a name on the hub or a folder; None: TF-IDF."""
    dimensions: int = 128
    """Most dimensions of TF-IDF after its SVD."""
    hidden: list[int] = field(default_factory=lambda: [256, 128])
    """``rqvae``: widths of the encoder's hidden layers; the decoder has them the other way round."""
    latent: int = 32
    """``rqvae``: length of the vectors that are quantized."""
    commitment: float = 0.25
    """``rqvae``: weight of the commitment loss, which keeps the encoder near its codes."""
    epochs: int = 200
    """``rqvae``: passes over the items."""
    batch_size: int = 1024
    """``rqvae``: items in a batch."""
    learning_rate: float = 1e-3
    """``rqvae``: of AdamW."""

    def check(self) -> None:
        """Refuse impossible values.

        Raises:
            ConfigError: Naming the setting.
        """
        require_at_least("sid", self, 1, "levels", "latent", "epochs", "batch_size", "dimensions")
        require_at_least("sid", self, 1, "disambiguation_codes")
        require_at_least("sid", self, 2, "codes")
        require_at_least("sid", self, 0, "seed", "commitment")
        require_above("sid", self, 0, "learning_rate")
        require(
            all(width >= 1 for width in self.hidden), f"sid.hidden is {list(self.hidden)}; widths must be at least 1."
        )


def load_semantic_ids(settings: object, source: str) -> SemanticIdConfig:
    """Return checked settings; arguments and errors as of ``load_settings``."""
    return load_settings(SemanticIdConfig, settings, source)
