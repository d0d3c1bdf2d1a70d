"""What a card can do: a small table from data sheets, and what of it a real run reaches.

Peaks are dense BF16 (no sparsity). ``efficiency`` is the share of the peak that the matrix products of such a model
reach while a stage works, bubble and exposed communication not counted: an assumption until a run calibrates it.
"""

from dataclasses import dataclass, replace

from megatron_ads.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One accelerator and its links; bytes per second are in one direction, per card."""

    name: str
    flops_per_second: float
    """Dense BF16 peak (FP32 on a CPU)."""
    memory_bytes: int
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """To the cards of the same node."""
    network_bytes_per_second: float
    """To other nodes."""
    cards_per_node: int = 8
    efficiency: float = 0.4
    link_efficiency: float = 0.7
    """Share of a link's rate that large collectives reach; an assumption."""
    reserved_bytes: int = 0
    """Memory that the driver, communication libraries and the allocator's fragments take."""
    storage_bytes_per_second: float = 2e9
    """What one node writes to shared storage; an assumption."""
    source: str

    @property
    def is_gpu(self) -> bool:
        """Whether GPU kernels run."""
        return self.name != "cpu"


_RESERVED = 2_500_000_000
"""CUDA context about 0.5 GB, NCCL's channels about 1 GB over the groups of such a job, fragments; an assumption."""


def _gpu(
    name: str,
    *,
    tflops: float,
    gigabytes: int,
    memory_tb: float,
    node_gb: float,
    source: str,
    network_gb: float = 50,
    efficiency: float = 0.4,
) -> Card:
    """Return a GPU from its data sheet: GB and TB per second in one direction, memory in GB."""
    return Card(
        name=name,
        flops_per_second=tflops * 1e12,
        memory_bytes=gigabytes * 10**9,
        memory_bytes_per_second=memory_tb * 1e12,
        node_bytes_per_second=node_gb * 1e9,
        network_bytes_per_second=network_gb * 1e9,
        efficiency=efficiency,
        reserved_bytes=_RESERVED,
        source=source,
    )  # fmt: skip


_GPUS = (
    _gpu("h100", tflops=989, gigabytes=80, memory_tb=3.35, node_gb=450,
         source="NVIDIA H100 SXM5 data sheet; one 400 Gb/s port per card"),
    _gpu("h200", tflops=989, gigabytes=141, memory_tb=4.8, node_gb=450,
         source="NVIDIA H200 SXM data sheet; one 400 Gb/s port per card"),
    # A seventh of an H100's arithmetic with the same memory rate: closer to its peak.
    _gpu("h20", tflops=148, gigabytes=96, memory_tb=4.0, node_gb=450, efficiency=0.6,
         source="published H20 figures, 96 GB model; one 400 Gb/s port per card"),
    _gpu("b200", tflops=2250, gigabytes=180, memory_tb=7.7, node_gb=900, efficiency=0.35,
         source="NVIDIA DGX B200 data sheet, an eighth of it; one 400 Gb/s port per card"),
    _gpu("a100", tflops=312, gigabytes=80, memory_tb=2.04, node_gb=300, network_gb=25, efficiency=0.45,
         source="NVIDIA A100 80GB SXM data sheet; one 200 Gb/s port per card"),
)  # fmt: skip
_CPU = Card(
    name="cpu",
    flops_per_second=50e9,
    memory_bytes=4_000_000_000,
    memory_bytes_per_second=10e9,
    node_bytes_per_second=1e9,
    network_bytes_per_second=1e9,
    efficiency=0.5,
    reserved_bytes=700_000_000,  # a Python process that imported torch, transformers and Megatron-Core
    source="one process on a server core: an order of magnitude; calibrate it",
)
CARDS = {card.name: card for card in (*_GPUS, _CPU)}
DEFAULT_CARD = "h100"


def card_named(name: str, memory_bytes: int | None = None) -> Card:
    """Return a card of the table, with another memory size where one is given.

    Raises:
        ConfigError: If the table has no such card.
    """
    if name not in CARDS:
        raise ConfigError(f"--gpu is {name!r}; the table has {', '.join(CARDS)}.")
    card = CARDS[name]
    return card if memory_bytes is None else replace(card, memory_bytes=memory_bytes)
