"""Free text made a ranking of what exists: all valid names, the nearest in embedding space first.

Source: BIGRec (arXiv:2308.08434), which embeds with the language model. Ours embeds runs of three letters by TF-IDF and
SVD, which needs no model and finds names that are spelt a little differently.
"""

from collections.abc import Sequence

import numpy as np

from megatron_ads.metrics.ranking import same_name
from megatron_ads.metrics.text import fit_embedding

_DIMENSIONS = 256
_RUN = 3


class NearestNames:
    """Valid names and where they lie."""

    def __init__(self, names: Sequence[str]) -> None:
        """Fit the embedding to the names."""
        self._names = list(names)
        runs = [_runs(name) for name in names]
        self._embedding = fit_embedding(runs, dimensions=_DIMENSIONS)
        self._vectors_ND = self._embedding.embed(runs)

    def rank(self, texts: Sequence[str], most: int) -> list[list[str]]:
        """Return the ``most`` nearest names of each text; none for a text that has no run of letters with any name.

        A text that is a name is nearest to it. Of names that are equally near, those named first come first.
        """
        found: list[list[str]] = []
        for text, vector_D in zip(texts, self._embedding.embed([_runs(text) for text in texts]), strict=True):
            if not vector_D.any():
                found.append([])
                continue
            near_N = self._vectors_ND @ vector_D
            near_N[[same_name(name) == same_name(text) for name in self._names]] = np.inf
            found.append([self._names[place] for place in np.argsort(-near_N, kind="stable")[:most]])
        return found


def _runs(text: str) -> str:
    """Return the overlapping runs of letters of a text, as words; the ends of its words count as letters."""
    letters = "".join(letter if letter.isalnum() else "_" for letter in f"_{same_name(text)}_")
    return " ".join(letters[start : start + _RUN] for start in range(len(letters) - _RUN + 1))
