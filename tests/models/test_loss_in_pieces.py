"""The loss computed piece by piece, as on a GPU, is the loss and the gradient of all tokens at once, bit for bit."""

import pytest
import torch
from torch import Tensor

from megatron_ads.layout import ParallelLayout
from megatron_ads.planning import memory
from megatron_ads.runtime import process_groups
from parity_tests.harness.ranks import run_ranks


def _losses_and_gradients(layout: ParallelLayout, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    process_groups.start(layout)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    from megatron_ads.models import specs

    def whole(labels_BS: Tensor, logits_SBV: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(logits_SBV.float(), labels_BS.t().contiguous()).t()

    assert specs.LOSS_TOKENS == memory.LOSS_TOKENS
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(specs, "LOSS_TOKENS", 4)
    found = []
    for compute in (whole, lambda labels, logits: specs.loss_in_pieces(whole, labels, logits)):
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(11, 1, 16, generator=generator).to(dtype).requires_grad_()
        labels = torch.randint(0, 16 * layout.tp, (1, 11), generator=generator)
        loss = compute(labels, hidden * 3)
        loss.backward(torch.rand(1, 11, generator=generator))
        assert hidden.grad is not None
        found.append((loss.detach(), hidden.grad))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pieces_of_the_loss_are_the_loss(dtype: torch.dtype) -> None:
    layout = ParallelLayout(world=2, tp=2)
    for (loss, grad), (piecewise, piecewise_grad) in run_ranks(2, _losses_and_gradients, layout, dtype):
        assert loss.shape == (1, 11) and torch.equal(piecewise, loss)
        assert torch.equal(piecewise_grad, grad) and grad.ne(0).any()
