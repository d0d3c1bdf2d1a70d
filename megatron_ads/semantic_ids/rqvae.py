"""RQ-VAE: an autoencoder whose latent vectors are quantized level by level.

    z = encoder(x),  codes c_l and residuals r_l of z,  z_q = sum_l e_{l,c_l},  x' = decoder(z + sg(z_q - z))
    loss = |x - x'|^2 + sum_l ( |sg(r_l) - e_{l,c_l}|^2 + beta |r_l - sg(e_{l,c_l})|^2 )

with sg the stop of gradients: the decoder's gradient goes straight through to the encoder, codes are drawn towards the
residuals, and the encoder towards the codes (commitment). Codebooks begin as k-means of the first weights' residuals;
a code that no item of an epoch has is put on the residual of a random item. Source: TIGER (arXiv:2305.05065), section
3.1; RQ-VAE, arXiv:2203.01941; reset of dead codes: Jukebox (arXiv:2005.00341), section 3.2.

Shape suffixes: N = items, B = items of a batch, D = dimensions of an embedding, Z = of a latent vector, C = codes.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from megatron_ads.config.semantic_ids import SemanticIdConfig
from megatron_ads.progress import Progress
from megatron_ads.semantic_ids.residual import nearest_codes, quantize, residual_kmeans


class RqVae(nn.Module):
    """Encoder, decoder and a codebook for each level."""

    def __init__(self, dimensions: int, config: SemanticIdConfig) -> None:
        """Take the length of the embeddings."""
        super().__init__()
        widths = [dimensions, *config.hidden, config.latent]
        self.encoder, self.decoder = _layers(widths), _layers(widths[::-1])
        shape = (config.codes, config.latent)
        self.codebooks = nn.ParameterList(nn.Parameter(torch.zeros(shape)) for _ in range(config.levels))

    def loss(self, x_BD: Tensor, *, commitment: float) -> Tensor:
        """Return the mean loss of an item."""
        z_BZ = self.encoder(x_BD)
        residual_BZ, quantization = z_BZ, x_BD.new_zeros(())
        for codes_CZ in self.codebooks:
            chosen_BZ = codes_CZ[nearest_codes(residual_BZ.detach(), codes_CZ.detach())]
            quantization = quantization + (residual_BZ.detach() - chosen_BZ).square().sum(1).mean()
            quantization = quantization + commitment * (residual_BZ - chosen_BZ.detach()).square().sum(1).mean()
            residual_BZ = residual_BZ - chosen_BZ.detach()
        straight_BZ = z_BZ - residual_BZ.detach()  # z + sg(z_q - z): what is left of z after all levels is z - z_q
        reconstruction = (x_BD - self.decoder(straight_BZ)).square().sum(1).mean()
        loss: Tensor = reconstruction + quantization
        return loss


def _layers(widths: list[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def fit_rqvae(vector_ND: Tensor, config: SemanticIdConfig) -> RqVae:
    """Return a trained model; the same vectors and settings give the same one on the same machine."""
    draw = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = RqVae(vector_ND.size(1), config)
    with torch.no_grad():
        first = residual_kmeans(model.encoder(vector_ND), levels=config.levels, codes=config.codes, seed=config.seed)
        for codes_CZ, centroids_CZ in zip(model.codebooks, first, strict=True):
            codes_CZ.copy_(centroids_CZ)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    with Progress(config.epochs, description="training the RQ-VAE", unit="epoch") as progress:
        for epoch in range(config.epochs):
            _train_epoch(model, optimizer, vector_ND, config, draw)
            if epoch < config.epochs - 1:  # codes put somewhere in the last epoch would not be trained
                reset_dead_codes(model, vector_ND, draw)
            progress.update()
    return model.eval().requires_grad_(False)


def _train_epoch(
    model: RqVae, optimizer: torch.optim.Optimizer, vector_ND: Tensor, config: SemanticIdConfig, draw: torch.Generator
) -> None:
    for numbers in torch.split(torch.randperm(len(vector_ND), generator=draw), config.batch_size):
        loss = model.loss(vector_ND[numbers], commitment=config.commitment)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@torch.no_grad()
def reset_dead_codes(model: RqVae, vector_ND: Tensor, draw: torch.Generator) -> int:
    """Put every code that no item has on the residual of a random item, level by level; return how many there were."""
    residual_NZ, dead = model.encoder(vector_ND), 0
    for codes_CZ in model.codebooks:
        used_C = torch.bincount(nearest_codes(residual_NZ, codes_CZ), minlength=len(codes_CZ)) > 0
        unused = int((~used_C).sum())
        if unused:
            codes_CZ[~used_C] = residual_NZ[torch.randint(len(residual_NZ), (unused,), generator=draw)]
        residual_NZ = residual_NZ - codes_CZ[nearest_codes(residual_NZ, codes_CZ)]
        dead += unused
    return dead


@torch.no_grad()
def encode(model: RqVae, vector_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of each vector, (N, L), and its reconstruction, (N, D)."""
    code_NL, quantized_NZ = quantize(model.encoder(vector_ND), list(model.codebooks))
    return code_NL, model.decoder(quantized_NZ)
