"""Pictures: powers of ten are set as such, names as they are."""

import matplotlib.text
import pytest
from test_results import random_tokens

from eaftlib.evaluation.statistics import aggregate
from eaftlib.report import figures


@pytest.mark.parametrize("name", ["a $ b", "$x_1$", "$\\broken", "base"])
def test_a_dollar_in_a_name_begins_no_formula_and_powers_of_ten_are_one(name, monkeypatch):
    drawn = {}
    draw = matplotlib.text.Text.draw

    def noted(self, renderer):
        drawn[self.get_text()] = self.get_parse_math()
        draw(self, renderer)

    monkeypatch.setattr(matplotlib.text.Text, "draw", noted)
    assert figures.landscape(aggregate(random_tokens(n=4000), 8, 0.15), name).png()
    powers = {text: as_formula for text, as_formula in drawn.items() if "mathdefault" in text}
    assert len(powers) >= 2 and all(powers.values())
    assert drawn[name] is False
