"""The quick form of tests/reliability/mutants.py; its long form and the figures are in docs/reliability.md."""

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

BY_NAME = {mutant.name: mutant for mutant in mutants.MUTANTS}


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_every_mutant_fits_the_code_of_today(mutant):
    code = (ROOT / "macosnet_hf" / mutant.module).read_text(encoding="utf-8")
    assert code.count(mutant.old) == 1
    compile(code.replace(mutant.old, mutant.new), mutant.module, "exec")
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
harmless = replace(mutant, old="float64.\\n", new="float64; no more.\\n")
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
    file = Path("macosnet_hf") / mutant.module
    sound = (ROOT / file).read_bytes()
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
    assert (tmp_path / "checkout" / file).read_bytes() == (ROOT / file).read_bytes() == sound
