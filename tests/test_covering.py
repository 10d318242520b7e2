"""The choice of cases: no pair of values is lost, and few cases say it all."""

import itertools
import math

import pytest
from covering import covering, pairs


def crossed(*extents):
    """Every case of factors with so many values, by a name."""
    values = itertools.product(*map(range, extents))
    return {"-".join(map(str, v)): {f"factor-{k}": value for k, value in enumerate(v)} for v in values}


def met(cases):
    return set().union(*map(pairs, cases))


CROSSES = [(3,), (5, 4), (2, 2, 2), (16, 14, 4, 2), (4, 4, 4, 2, 2), (1, 7, 1)]


@pytest.mark.parametrize("extents", CROSSES, ids=str)
def test_every_pair_is_met_by_few(extents):
    cases = crossed(*extents)
    chosen = covering(cases)
    assert met(cases[name] for name in chosen) == met(cases.values())
    assert len(chosen) <= 1.5 * math.prod(sorted(extents)[-2:])


def test_cases_need_not_be_all_of_a_cross():
    cases = {name: case for name, case in crossed(4, 4, 4).items() if sum(case.values()) % 3 != 1}
    assert met(cases[name] for name in covering(cases)) == met(cases.values())


@pytest.mark.parametrize("case", [{}, {"factor": 1}], ids=["no factor", "one factor"])
def test_a_test_of_one_case_runs(case):
    assert covering({"test": case}) == {"test"}


def test_the_choice_depends_on_names_alone():
    cases = crossed(4, 5, 6)
    assert covering(dict(reversed(cases.items()))) == covering(cases)
    others = {f"other-{name}": case for name, case in cases.items()}
    assert covering(others) != {f"other-{name}" for name in covering(cases)}


@pytest.mark.parametrize(("name", "number"), [("one", 1), ("two", 2), ("both", 1), ("both", 2)])
@pytest.mark.parametrize("b", "xyz")
@pytest.mark.parametrize("a", "xyz")
def test_a_list_of_parameters_is_one_factor(a, b, name, number, request):
    """In this very session: all rows of the list, whatever two have in common, in every pair with the others."""
    items = [item for item in request.session.items if item.originalname == request.node.originalname]
    params = [item.callspec.params for item in items]
    assert (a, b, name, number) in [tuple(p[key] for key in ("a", "b", "name", "number")) for p in params]
    if len(items) > 1 and not request.config.option.keyword:
        assert len({(p["a"], p["name"], p["number"]) for p in params}) == 12
        assert len({(p["a"], p["b"]) for p in params}) == 9
        assert request.config.option.full or len(items) < 18
