"""Random draws that depend on nothing but names and numbers: the same on every machine, version and layout.

``stable_integer`` and its like are keyed by names, such as a seed and a row's id. ``shuffled`` computes a shuffled
order place by place, with nothing to store: a Feistel network permutes the numbers below the next power of four;
numbers that are not below ``size`` are sent through again until they are (cycle walking), which keeps it a permutation.
Source: Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
"""

import hashlib
import random

_ROUNDS = 6
_MASK = (1 << 64) - 1


def stable_key(*names: object, separator: str = ":") -> bytes:
    """Return 32 bytes to sort by, decided by ``names`` as they are written."""
    return hashlib.sha256(separator.join(map(str, names)).encode(errors="surrogatepass")).digest()


def stable_integer(*names: object, separator: str = ":") -> int:
    """Return an integer of 64 bits, decided by ``names``."""
    return int.from_bytes(stable_key(*names, separator=separator)[:8])


def stable_random(*names: object) -> random.Random:
    """Return a source of several draws, decided by ``names``."""
    return random.Random(stable_key(*names))


def mix(value: int) -> int:
    """Return 64 well-mixed bits of a 64-bit number (the finalizer of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key_of(*numbers: int) -> int:
    """Return one 64-bit key for a few numbers, such as (seed, source, epoch)."""
    key = 0
    for number in numbers:
        key = mix(key ^ (number & _MASK))
    return key


def shuffled(place: int, size: int, key: int) -> int:
    """Return which of ``size`` items is at ``place`` in the order that ``key`` decides."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    item = _feistel(place, half_bits, key)
    while item >= size:
        item = _feistel(item, half_bits, key)
    return item


def _feistel(value: int, half_bits: int, key: int) -> int:
    half = (1 << half_bits) - 1
    left, right = value >> half_bits, value & half
    for round_number in range(_ROUNDS):
        left, right = right, left ^ (mix(key ^ (round_number << 56) ^ right) & half)
    return left << half_bits | right
