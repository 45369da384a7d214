"""What a model must beat to have been worth training: TF-IDF and logistic regression on the same split.

python -m gemini.model.training.baseline CACHE
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gemini.model.data import Review, load_sentiment

# Words and pairs of them where spaces part words, 1 to 3 characters where nothing does.
_FEATURES = {"en": ("word", (1, 2)), "zh": ("char", (1, 3))}


def baseline_accuracy(train: Sequence[Review], test: Sequence[Review], language: str) -> float:
    """Percent of the test reviews of a language that a linear model gets right, fitted to the others."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    analyzer, ngrams = _FEATURES[language]
    model = make_pipeline(
        TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    )
    known, asked = (
        [review for review in reviews if review.language == language] for reviews in (train, test)
    )
    model.fit([review.text for review in known], [review.label for review in known])
    labels = [review.label for review in asked]
    return 100 * float(model.score([review.text for review in asked], labels))


def main(cache: Path) -> None:
    """Print the accuracy of both languages as JSON."""
    train, test = load_sentiment(cache, "train"), load_sentiment(cache, "test")
    print(json.dumps({language: baseline_accuracy(train, test, language) for language in _FEATURES}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
