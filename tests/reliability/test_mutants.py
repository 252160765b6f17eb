"""The quick form of tests/reliability/mutants.py; its long form and the figures are in docs/reliability.md."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RELIABILITY = ROOT / "tests" / "reliability"
sys.path.insert(0, str(RELIABILITY))
import mutants  # noqa: E402
from rewriting import rewrite  # noqa: E402

BY_NAME = {mutant.name: mutant for mutant in mutants.MUTANTS}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_every_mutant_fits_the_code_of_today(mutant):
    source = (ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutant.apply(source)
    compile(changed, mutant.file, "exec")
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    asked = [words for words in mutants.commands(mutant) if words]
    assert asked
    for file in (word for words in asked for word in words if word.endswith(".py")):
        assert (ROOT / file).is_file()


TRIES = """
import json, sys
from dataclasses import replace
from pathlib import Path
import mutants
copy = mutants.make_copy(Path(sys.argv[1]))
(mutant,) = (each for each in mutants.MUTANTS if each.name == sys.argv[2])
mutant = replace(mutant, properties="")
harmless = replace(mutant, new=f"({mutant.old}) * 1")
found = [mutants.run_tests(copy, mutant.tests), mutants.try_mutant(copy, mutant), mutants.try_mutant(copy, harmless)]
try:
    mutants.run_tests(copy, ["tests/no_such_file.py"])
except RuntimeError as error:
    found.append(str(error))
print(json.dumps(found))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_mutant_is_made_in_the_copy_noticed_by_its_tests_and_gone_afterwards(tmp_path):
    mutant = BY_NAME["errors of keypoints along x alone"]
    sound = (ROOT / mutant.file).read_bytes()
    done = subprocess.run(
        [sys.executable, "-c", TRIES, str(tmp_path), mutant.name],
        cwd=RELIABILITY,
        capture_output=True,
        text=True,
        check=True,
    )
    before, (nothing, noticed), harmless, error = json.loads(done.stdout)
    assert before is None
    assert nothing is None
    assert noticed.startswith("test_")
    assert harmless == [None, None]
    assert "no_such_file" in error
    assert (tmp_path / "checkout" / mutant.file).read_bytes() == (ROOT / mutant.file).read_bytes() == sound


# ---- rewriting -------------------------------------------------------------------------------------------------------

SOURCE = '''
def scale(points, size):
    """Half of the extent."""
    half = (size - 1) / 2  # of pixel centres
    return call(points, half, mode="a", corners=True)


class Box:
    def length(self, low, high):
        total = low
        total += high
        return max(low - high, high - low)
'''


@pytest.mark.parametrize(
    ("function", "old", "new", "expected"),
    [
        ("scale", "($s - 1) / 2", "$s / 2", "half = size / 2"),
        ("scale", "call(..., corners=True)", "call(..., corners=False)", "call(points, half, corners=False, mode='a')"),
        ("scale", "call($p, ...)", "other($p + 1, ...)", "other(points + 1, half, mode='a', corners=True)"),
        ("Box.length", "max($a - $b, $b - $a)", "$b", "return high"),
        ("Box.length", "$t += $v", "$t = $v", "total = high"),
    ],
)
def test_a_pattern_is_replaced_whatever_the_variables_are_called(function, old, new, expected):
    changed = rewrite(SOURCE, function, old, new)
    assert expected in changed
    renamed = SOURCE.replace("size", "extent").replace("high", "top")
    assert rewrite(renamed, function, old, new) == changed.replace("size", "extent").replace("high", "top")


@pytest.mark.parametrize(
    ("function", "old", "new", "message"),
    [
        ("shrink", "1", "2", "no function shrink"),
        ("Box.scale", "1", "2", "no function Box.scale"),
        ("scale", "$a + $b", "$a", "matches 0 times"),
        ("Box.length", "$a - $b", "$a", "matches 2 times"),
        ("Box.length", "max($a - $b, $a - $b)", "$a", "matches 0 times"),
        ("scale", "call(..., corners=False)", "$a", "matches 0 times"),
        ("scale", "$a / 2", "$b", r"\$b is not bound"),
    ],
)
def test_a_pattern_that_does_not_fit_is_an_error(function, old, new, message):
    with pytest.raises(LookupError, match=message):
        rewrite(SOURCE, function, old, new)
