"""Residual quantization: the nearest code of each level, of what the levels before it left over; k-means of residuals.

    r_0 = z        c_l = argmin_c |r_l - e_{l,c}|        r_{l+1} = r_l - e_{l,c_l}        z ~ sum_l e_{l,c_l}

Source: TIGER (arXiv:2305.05065), section 3.1; residual k-means as in QARM (arXiv:2411.11739).

Shape suffixes: N = items, D = dimensions of what is quantized, L = levels, C = codes of a level.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_ads.progress import Progress

_ROWS = 1 << 14
"""Items whose distances to all codes are in memory at a time."""
_POINTS_PER_CODE = 256
"""Vectors that centroids are learned from, for each of them; more change little (faiss has the same limit)."""


def nearest_codes(residual_ND: Tensor, codes_CD: Tensor) -> Tensor:
    """Return the number of the nearest code of each row, (N,); of equally near ones the first."""
    norms_C = codes_CD.square().sum(1)
    found = [
        torch.addmm(norms_C, rows, codes_CD.T, alpha=-2.0).argmin(1)  # |r|^2 is the same for all codes
        for rows in torch.split(residual_ND, _ROWS)
    ]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def quantize(vector_ND: Tensor, codebooks: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the codes of each row, (N, L), and the sum of what they stand for, (N, D)."""
    residual_ND, levels = vector_ND, []
    for codes_CD in codebooks:
        code_N = nearest_codes(residual_ND, codes_CD)
        residual_ND = residual_ND - codes_CD[code_N]
        levels.append(code_N)
    return torch.stack(levels, 1), vector_ND - residual_ND


def kmeans(vector_ND: NDArray[np.float32], codes: int, *, seed: int) -> NDArray[np.float32]:
    """Return ``codes`` centroids, (C, D). With fewer different vectors than codes, the first stands for the rest."""
    from sklearn.cluster import KMeans  # here: the import takes seconds

    draw = np.random.default_rng(seed)
    most = codes * _POINTS_PER_CODE
    if len(vector_ND) > most:
        vector_ND = vector_ND[np.sort(draw.choice(len(vector_ND), most, replace=False))]
    different_ND = np.unique(vector_ND, axis=0)
    if len(different_ND) <= codes:
        return np.concatenate([different_ND, np.repeat(different_ND[:1], codes - len(different_ND), axis=0)])
    fitted = KMeans(codes, n_init=1, random_state=seed).fit(vector_ND)
    centroid_CD: NDArray[np.float32] = fitted.cluster_centers_.astype(np.float32)
    return centroid_CD


def residual_kmeans(vector_ND: Tensor, *, levels: int, codes: int, seed: int) -> list[Tensor]:
    """Return a codebook for each level, (C, D) each."""
    residual_ND, codebooks = vector_ND, []
    with Progress(levels, description="k-means", unit="level") as progress:
        for level in range(levels):
            codes_CD = torch.from_numpy(kmeans(residual_ND.numpy(), codes, seed=seed + level))
            residual_ND = residual_ND - codes_CD[nearest_codes(residual_ND, codes_CD)]
            codebooks.append(codes_CD)
            progress.update()
    return codebooks
