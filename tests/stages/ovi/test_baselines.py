"""Text embedding and retrieval against what they should be, computed another way."""

import numpy as np
import pytest

from stages.ovi.methods import build
from stages.ovi.settings import OVI, Constraint, Retrieval, TextEmbedding
from tests.support.prompt_methods import run


def test_text_embedding_raw_and_rescaled(context, rows):
    raw = run(TextEmbedding(), context, rows)
    scaled = run(TextEmbedding(rescale=True), context, rows)
    norms = np.linalg.norm(context.reference.index.vectors_NE.astype(np.float64), axis=1)
    for row in rows:
        np.testing.assert_array_equal(raw[row["id"]]["embedding"], row["text"])
        z = scaled[row["id"]]["embedding"]
        assert np.linalg.norm(z) == pytest.approx(norms.mean(), rel=1e-5)
        np.testing.assert_allclose(z / np.linalg.norm(z), row["text"] / np.linalg.norm(row["text"]), atol=1e-6)


@pytest.mark.parametrize("k", [1, 5])
def test_retrieval_is_the_mean_of_the_nearest(context, rows, k):
    bank = np.array(context.reference.index.vectors_NE)
    unit = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    got = run(Retrieval(k=k), context, rows)
    for row in rows:
        nearest = np.argsort(-(unit @ row["text"]))[:k]
        np.testing.assert_allclose(got[row["id"]]["embedding"], bank[nearest].mean(0), atol=1e-5)
    with pytest.raises(ValueError, match="300 rows"):
        build(Retrieval(k=301), context)
    with pytest.raises(ValueError, match="lower k"):
        build(OVI(constraint=Constraint(neighbours=1.0, k=301)), context)
