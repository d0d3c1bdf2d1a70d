"""Answers as vectors, and vectors as a few small numbers: product quantisation by faiss.

    vector = sum_i line_i / log2(1 + i), scaled to length 1        line_i: embedding of an answer's i-th line
    code_m = argmin_c | vector[m-th part] - centroid_{m, c} |      m of M parts, 2^bits centroids each, by k-means

Lines are embedded one by one, so that order counts and the few different lines are embedded once (ours; Taiji embeds
reasoning and item as one text). Source: Taiji, section 2.4; product quantisation, Jegou et al., TPAMI 2011.

Shape suffixes: N = answers, L = different lines, D = length of the vectors, M = parts.
"""

from collections.abc import Sequence
from types import ModuleType

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from megatron_ads.errors import ConfigError, DataError
from megatron_ads.metrics.encoder import Embed, sentence_encoder
from megatron_ads.metrics.text import fit_embedding

Vectors = NDArray[np.float32]


def faiss_module() -> ModuleType:
    """Return faiss, set to one thread: sums then have one order, and codes are the same every time.

    Raises:
        ConfigError: If it is not installed.
    """
    try:
        import faiss
    except ImportError:
        raise ConfigError(
            "Features need faiss, which is not installed. Install it: pip install 'megatron-ads[features]'."
        ) from None
    faiss.omp_set_num_threads(1)
    module: ModuleType = faiss
    return module


def embed_answers(
    lines_N: Sequence[Sequence[str]], learned: Sequence[bool], *, encoder: str | None, dimensions: int
) -> Vectors:
    """Return (N, D) vectors of length 1; of length 0 for answers without a line that has a known word.

    Args:
        lines_N: Of each answer, the most important first.
        learned: Whether TF-IDF is fitted on an answer's lines: on those of users that are not held out.
        encoder: A model of sentence-transformers; None: TF-IDF, reduced to ``dimensions``.
        dimensions: At most, of TF-IDF.

    Raises:
        ConfigError: If the encoder cannot be loaded.
    """
    different = {line: number for number, line in enumerate(dict.fromkeys(line for lines in lines_N for line in lines))}
    if not different:
        return np.zeros((len(lines_N), 1), dtype=np.float32)
    embed = _embedding(lines_N, learned, encoder, dimensions)
    vector_LD = embed(list(different))
    columns = [different[line] for lines in lines_N for line in lines]
    weights = [1 / np.log2(2 + place) for lines in lines_N for place in range(len(lines))]
    starts = np.cumsum([0, *map(len, lines_N)])
    weight_NL = csr_matrix((weights, columns, starts), shape=(len(lines_N), len(different)))
    summed_ND = np.asarray(weight_NL @ vector_LD)
    lengths_N1 = np.linalg.norm(summed_ND, axis=1, keepdims=True)
    unit_ND: Vectors = np.divide(summed_ND, lengths_N1, out=np.zeros_like(summed_ND), where=lengths_N1 > 0)
    return unit_ND.astype(np.float32)


def _embedding(
    lines_N: Sequence[Sequence[str]], learned: Sequence[bool], encoder: str | None, dimensions: int
) -> Embed:
    if encoder is not None:
        return sentence_encoder(encoder, "features.encoder")
    known = [line for lines, counts in zip(lines_N, learned, strict=True) if counts for line in lines]
    return fit_embedding(list(dict.fromkeys(known)), dimensions=dimensions).embed


def product_codes(
    vector_ND: Vectors, learned: Sequence[bool], *, parts: int, bits: int, seed: int
) -> list[tuple[int, ...]]:
    """Return the M codes of each vector, from 0 to 2^bits - 1; none for a vector of length 0.

    Args:
        vector_ND: Of answers.
        learned: Whether centroids are learned from a vector.
        parts: M. Vectors are filled up with zeros until M divides their length.
        bits: Of a code.
        seed: Of the first centroids.

    Raises:
        ConfigError: If faiss is not installed.
        DataError: If there are fewer vectors to learn from than centroids.
    """
    faiss, said_N = faiss_module(), np.linalg.norm(vector_ND, axis=1) > 0
    padded_ND = np.pad(vector_ND, ((0, 0), (0, -vector_ND.shape[1] % parts)))
    learned_ND = np.ascontiguousarray(padded_ND[said_N & np.asarray(learned)])
    if len(learned_ND) < 2**bits:
        raise DataError(
            f"There are {len(learned_ND)} answers about users that are learned from, fewer than the {2**bits} "
            f"centroids of features.bits = {bits}. Give more answers, or lower it."
        )
    quantizer = faiss.ProductQuantizer(padded_ND.shape[1], parts, bits)
    quantizer.cp.seed, quantizer.cp.min_points_per_centroid = seed, 1
    quantizer.train(learned_ND)
    packed = quantizer.compute_codes(np.ascontiguousarray(padded_ND))
    code_NM = faiss.unpack_bitstrings(packed, parts, bits)
    return [tuple(map(int, codes)) if said else () for codes, said in zip(code_NM, said_N, strict=True)]
