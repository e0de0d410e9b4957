"""What a method's settings leave open, and what they refuse."""

import pytest
from pydantic import ValidationError

from stages.ovi.settings import EARLY, OVI, Constraint, Stop
from tests.support.prompt_methods import run


def test_early_stopping_is_the_default(context, rows):
    assert OVI().stopping == EARLY
    assert OVI(constraint=Constraint(mahalanobis=0.1)).stopping == Stop()
    assert OVI(stop=Stop()).stopping == OVI(recipe="published").stopping == Stop()
    got = run(OVI(steps=200), context, rows)
    assert any(row["stopped"] == "stalled" and 5 <= row["steps"] < 200 for row in got.values())


def test_published_recipe_cannot_be_bent():
    assert OVI(recipe="published").limit == 1000
    with pytest.raises(ValidationError, match="fixes steps, lr"):
        OVI(recipe="published", steps=10, lr=0.1)
    with pytest.raises(ValidationError, match="stop"):
        OVI(recipe="published", stop=Stop(patience=3))
