"""The breaks of `make mutants`: each still finds the rule that it breaks."""

import pytest

from tests.durability.mutants import MUTANTS, ROOT, Mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_rule_that_is_broken_stands_where_it_is_looked_for(mutant: Mutant) -> None:
    assert (ROOT / mutant.file).read_text().count(mutant.whole) == 1
    assert mutant.broken != mutant.whole and all((ROOT / tests).exists() for tests in mutant.tests)
