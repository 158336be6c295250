"""CIDEr-D of one caption a picture (Vedantam et al., arXiv 1411.5726), from its formulas.

For captions that a tokenizer leaves as they are: lower case, no punctuation, single spaces.
"""

from __future__ import annotations

import math
from collections import Counter


def ngrams(caption: str, n: int) -> Counter[tuple[str, ...]]:
    words = caption.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def cider_d(captions: list[str], references: list[list[str]], sigma: float = 6.0) -> list[float]:
    """10 x the mean over n = 1..4 and over the references of a picture."""
    num_pictures = len(captions)
    scores = [0.0] * num_pictures
    for n in range(1, 5):
        document_frequency: Counter[tuple[str, ...]] = Counter()
        for texts in references:
            document_frequency.update({gram for text in texts for gram in ngrams(text, n)})

        def weights(
            text: str, n: int = n, df: Counter[tuple[str, ...]] = document_frequency
        ) -> dict[tuple[str, ...], float]:
            return {
                gram: count * (math.log(num_pictures) - math.log(max(1, df[gram])))
                for gram, count in ngrams(text, n).items()
            }

        for i, (caption, texts) in enumerate(zip(captions, references, strict=True)):
            g = weights(caption)
            for text in texts:
                r = weights(text)
                norms = [math.sqrt(sum(v * v for v in vector.values())) for vector in (g, r)]
                product = sum(min(v, r.get(gram, 0.0)) * r.get(gram, 0.0) for gram, v in g.items())
                if all(norms):
                    product /= norms[0] * norms[1]
                length = len(caption.split()) - len(text.split())
                penalty = math.exp(-(length**2) / (2 * sigma**2))
                scores[i] += 10 * product * penalty / len(texts) / 4
    return scores
