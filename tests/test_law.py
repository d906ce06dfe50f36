"""The law: Counter-Hebb updates with shared weights and GaLU equal autograd's gradients (float64, 1e-9)."""

import pytest

import fxfeedback
from fxfeedback.rules import RULES

ALL_RULES = {id(rule): rule for rule in RULES.values()}.values()


@pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: rule.name)
def test_every_rule_obeys_the_law(rule):
    fxfeedback.check_rule(rule)
