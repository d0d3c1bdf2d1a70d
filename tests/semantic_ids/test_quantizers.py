"""Residual k-means and the RQ-VAE: the codes of each level are those of what the levels before it left over."""

import numpy as np
import pytest
import torch

from megatron_ads.config.semantic_ids import SemanticIdConfig
from megatron_ads.semantic_ids import rqvae
from megatron_ads.semantic_ids.residual import nearest_codes, quantize, residual_kmeans
from megatron_ads.semantic_ids.rqvae import RqVae, fit_rqvae, reset_dead_codes

# Four groups of four points: groups are 10 apart, the points of a group 1 apart.
GROUPS = [(0.0, 0.0), (10.0, 0.0), (0.0, 10.0), (10.0, 10.0)]
POINTS = [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]
GRID = torch.tensor([[x + dx, y + dy] for x, y in GROUPS for dx, dy in POINTS])


def test_each_level_takes_the_nearest_code_of_what_is_left() -> None:
    levels = [torch.tensor([[0.0, 0.0], [10.0, 0.0]]), torch.tensor([[1.0, 1.0], [-1.0, 0.0]])]
    codes, sums = quantize(torch.tensor([[9.0, 0.0], [1.2, 1.0]]), levels)
    assert codes.tolist() == [[1, 1], [0, 0]]  # 9 - 10 = -1 and 1.2 - 0 = 1.2 are what level 1 sees
    assert sums.tolist() == [[9.0, 0.0], [1.0, 1.0]]


def test_of_equally_near_codes_the_first_is_taken() -> None:
    assert nearest_codes(torch.zeros(1, 2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist() == [0]


def test_residual_kmeans_finds_groups_and_then_the_points_of_a_group() -> None:
    codebooks = residual_kmeans(GRID, levels=2, codes=4, seed=0)
    codes, sums = quantize(GRID, codebooks)
    assert [len(set(codes[group * 4 : group * 4 + 4, 0].tolist())) for group in range(4)] == [1, 1, 1, 1]
    assert len(set(map(tuple, codes.tolist()))) == 16
    assert torch.allclose(sums, GRID, atol=1e-5)


def test_more_codes_than_different_vectors_leave_the_rest_unused() -> None:
    (codebook,) = residual_kmeans(torch.tensor([[0.0], [0.0], [5.0]]), levels=1, codes=4, seed=0)
    codes, _ = quantize(torch.tensor([[0.0], [5.0]]), [codebook])
    assert codebook.shape == (4, 1)
    assert codes.tolist() == [[0], [1]]


def config(**settings: object) -> SemanticIdConfig:
    return SemanticIdConfig(
        **{"levels": 2, "codes": 4, "latent": 4, "hidden": [32], "epochs": 300, "learning_rate": 5e-3} | settings
    )


@pytest.fixture(scope="module")
def fitted() -> RqVae:
    return fit_rqvae((GRID - GRID.mean(0)) / GRID.std(), config(batch_size=8))


def test_an_rqvae_reconstructs_what_it_was_trained_on(fitted: RqVae) -> None:
    x = (GRID - GRID.mean(0)) / GRID.std()
    codes, rebuilt = rqvae.encode(fitted, x)
    assert ((x - rebuilt).square().sum() / x.square().sum()).item() < 0.1
    groups = {tuple(codes[first : first + 4, 0].tolist()) for first in range(0, 16, 4)}
    assert len({group[0] for group in groups}) == 4
    assert all(len(set(group)) == 1 for group in groups)


def test_the_same_seed_trains_the_same_model(fitted: RqVae) -> None:
    again = fit_rqvae((GRID - GRID.mean(0)) / GRID.std(), config(batch_size=8))
    for one, other in zip(fitted.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_the_loss_is_reconstruction_codebook_and_commitment_with_gradients_where_they_belong() -> None:
    model = RqVae(1, config(levels=1, codes=2, latent=1, hidden=[]))
    with torch.no_grad():
        for layer, weight in ((model.encoder[0], 2.0), (model.decoder[0], 3.0)):
            layer.weight.fill_(weight)
            layer.bias.zero_()
        model.codebooks[0].copy_(torch.tensor([[1.0], [5.0]]))
    loss = model.loss(torch.tensor([[2.0]]), commitment=0.25)
    # z = 4, nearest code 5, x' = 15: (2 - 15)^2 + (4 - 5)^2 + 0.25 (4 - 5)^2
    assert loss.item() == pytest.approx(169 + 1 + 0.25)
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.codebooks[0].grad is not None
    assert model.codebooks[0].grad.flatten().tolist() == [0.0, 2.0]  # of (4 - e)^2 at e = 5
    # Straight through: d/dw of the reconstruction is -2 (2 - 15) * 3 * x = 156; of the commitment 0.25 * 2 (4 - 5) x.
    assert model.encoder[0].weight.grad is not None
    assert model.encoder[0].weight.grad.item() == pytest.approx(156 - 1)


def test_a_code_that_no_item_has_is_put_on_an_item() -> None:
    model = RqVae(1, config(levels=1, codes=2, latent=1, hidden=[]))
    with torch.no_grad():
        model.encoder[0].weight.fill_(1.0)
        model.encoder[0].bias.zero_()
        model.codebooks[0].copy_(torch.tensor([[0.0], [99.0]]))
    x = torch.tensor([[3.0], [3.0], [-3.0]])
    assert reset_dead_codes(model, x, torch.Generator().manual_seed(0)) == 1
    assert model.codebooks[0].flatten().tolist()[0] == 0.0
    assert abs(model.codebooks[0][1].item()) == 3.0
    assert reset_dead_codes(model, x, torch.Generator().manual_seed(0)) == 0


def test_numbers_of_kmeans_are_of_32_bits() -> None:
    assert residual_kmeans(GRID, levels=1, codes=3, seed=0)[0].numpy().dtype == np.float32
