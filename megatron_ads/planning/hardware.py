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
    """What a process can allocate, the driver's own share taken off."""
    memory_bytes_per_second: float
    node_bytes_per_second: float
    """To the cards of the same node."""
    network_bytes_per_second: float = 50e9
    """To other nodes."""
    cards_per_node: int = 8
    efficiency: float = 0.4
    link_efficiency: float = 0.7
    """Share of a link's rate that large collectives reach; an assumption."""
    context_bytes: int = 700_000_000
    """CUDA context and the workspaces of its libraries; an assumption."""
    communicator_bytes: int = 300_000_000
    """NCCL's channels and buffers for one process group of several ranks; an assumption."""
    fragments: float = 0.02
    """Share of the memory that lies unused between the allocator's blocks; an assumption."""
    host_bytes_per_second: float = 10e9
    """From one card to the memory of its host; an assumption."""
    writer_bytes_per_second: float = 1.5e9
    """What one rank's writer reaches, checksum included; an assumption."""
    storage_bytes_per_second: float = 2e9
    """What one node writes to shared storage; an assumption."""
    source: str

    def reserved_bytes(self, communicators: int) -> int:
        """Return what is taken whatever the model: context, process groups, fragments."""
        groups = communicators * self.communicator_bytes
        return self.context_bytes + groups + int(self.fragments * self.memory_bytes)


CARDS = {
    card.name: card
    for card in (
        # An H100 80GB shows 81,559 MiB, of which a process gets 85.0e9 bytes.
        Card(name="h100", flops_per_second=989e12, memory_bytes=85 * 10**9, memory_bytes_per_second=3.35e12,
             node_bytes_per_second=450e9, source="NVIDIA H100 SXM5 data sheet; one 400 Gb/s port per card"),
        # An H200 shows 143,771 MiB; of the other cards the memory is the data sheet's.
        Card(name="h200", flops_per_second=989e12, memory_bytes=149 * 10**9, memory_bytes_per_second=4.8e12,
             node_bytes_per_second=450e9, source="NVIDIA H200 SXM data sheet; one 400 Gb/s port per card"),
        # A seventh of an H100's arithmetic with the same memory rate: closer to its peak.
        Card(name="h20", flops_per_second=148e12, memory_bytes=96 * 10**9, memory_bytes_per_second=4e12,
             node_bytes_per_second=450e9, efficiency=0.6,
             source="published H20 figures, 96 GB model; one 400 Gb/s port per card"),
        Card(name="b200", flops_per_second=2250e12, memory_bytes=180 * 10**9, memory_bytes_per_second=7.7e12,
             node_bytes_per_second=900e9, efficiency=0.35,
             source="NVIDIA DGX B200 data sheet, an eighth of it; one 400 Gb/s port per card"),
        Card(name="a100", flops_per_second=312e12, memory_bytes=80 * 10**9, memory_bytes_per_second=2.04e12,
             node_bytes_per_second=300e9, network_bytes_per_second=25e9, efficiency=0.45,
             source="NVIDIA A100 80GB SXM data sheet; one 200 Gb/s port per card"),
        # Context: a Python process that imported torch, transformers and Megatron-Core.
        Card(name="cpu", flops_per_second=50e9, memory_bytes=4 * 10**9, memory_bytes_per_second=10e9,
             node_bytes_per_second=1e9, network_bytes_per_second=1e9, efficiency=0.5, communicator_bytes=0, fragments=0,
             source="one process on a server core: an order of magnitude; calibrate it"),
    )
}  # fmt: skip
DEFAULT_CARD = "h100"


def card_named(name: str, memory_bytes: int | None = None) -> Card:
    """Return a card of the table, with another memory size where one is given."""
    if name not in CARDS:
        raise ConfigError(f"--gpu is {name!r}; the table has {', '.join(CARDS)}.")
    card = CARDS[name]
    return card if memory_bytes is None else replace(card, memory_bytes=memory_bytes)
