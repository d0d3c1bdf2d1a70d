"""Inner products of gradients that several ranks hold parts of, in one buffer that each pass fills anew."""

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from parity_tests.harness.ranks import run_ranks

ELEMENTS = (1 << 18) + 1
"""More than is multiplied at a time."""


def _table() -> list[list[float]]:
    from megatron_ads.optim.inner_products import inner_products

    buffer = torch.zeros(ELEMENTS)

    def gradients() -> Iterator[list[Tensor]]:
        for first, last in ((2.0, 0.0), (1.0, 1.0), (0.0, -3.0)):
            buffer[0], buffer[-1] = first, last
            yield [[buffer[:1]], [], [buffer[1:].view(1, -1)]][dist.get_rank()]  # rank 1 trains nothing

    return inner_products(gradients(), 3).tolist()


def test_each_element_counts_once_and_a_rank_without_gradients_takes_part() -> None:
    # Gradients (2, 0), (1, 1) and (0, -3); their sum is (3, -2), so that I = (6, 1, 6).
    for table in run_ranks(3, _table):
        assert table == [[4, 2, 0], [2, 2, -3], [0, -3, 9]]
        assert [sum(row) for row in table] == [6, 1, 6]
