"""The mistakes of tests/mutations can still be made: what each puts something else for stands there once."""

import pytest

from tests.mutations.cases import MISTAKES
from tests.support import ROOT


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_the_mistake_can_be_made(number: int) -> None:
    mistake = MISTAKES[number]
    assert (ROOT / mistake.file).read_text(encoding="utf-8").count(mistake.right) == 1, mistake
    assert mistake.wrong != mistake.right
    files = [word for word in mistake.tests.split() if word.startswith("tests/")]
    assert files and all((ROOT / file).is_file() for file in files), mistake.tests
