"""What a prompt asks for."""

import pytest


def test_the_oracle_needs_what_was_asked():
    from stages.ovi.scoring import asked_of

    asked = asked_of({"objects": '[{"shape": "star", "color": null}]', "relation": None, "count": 2})
    assert asked == {"objects": [{"shape": "star"}], "relation": None, "count": 2}
    assert asked_of({"objects": None}) is None
    with pytest.raises(ValueError, match="JSON"):
        asked_of({"objects": "a star"})
