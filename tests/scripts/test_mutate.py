"""The mutants are of this code: that they are killed takes minutes and is for `python scripts/mutate.py` to show."""

from __future__ import annotations

import ast

import pytest

from scripts import mutate


@pytest.mark.parametrize("mutant", mutate.MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_one_place_and_is_still_python(mutant):
    source = (mutate.ROOT / mutant.file).read_text(encoding="utf-8")
    changed = mutate.mutated(mutant, source)
    ast.parse(changed)
    assert changed != source and (mutate.ROOT / mutant.test).is_file()


def test_names_tell_mutants_apart_and_list_prints_them(capsys):
    assert len({mutant.name for mutant in mutate.MUTANTS}) == len(mutate.MUTANTS)
    assert mutate.main(["--list", "--only=sign"]) == 0
    assert capsys.readouterr().out.count("caught by") == sum("sign" in mutant.name for mutant in mutate.MUTANTS)
    with pytest.raises(SystemExit):
        mutate.main(["--only=nothing of the kind"])


@pytest.mark.slow
def test_kills_what_a_test_catches_and_reports_what_survives(tmp_path, monkeypatch, capsys):
    """A tree of two files, in which one mutant is caught and another is not."""
    (tmp_path / "lightningrl").mkdir()
    (tmp_path / "lightningrl" / "__init__.py").touch()
    (tmp_path / "lightningrl" / "sums.py").write_text("def add(a, b):\n    return a + b + 0\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_sums.py").write_text("from lightningrl.sums import add\n\n\ndef test_add():\n    assert add(1, 2) == 3\n")
    caught = mutate.Mutant("sign", "lightningrl/sums.py", "a + b", "a - b", "tests/test_sums.py")
    missed = mutate.Mutant("order", "lightningrl/sums.py", "a + b", "b + a", "tests/test_sums.py")
    monkeypatch.setattr(mutate, "ROOT", tmp_path)
    monkeypatch.setattr(mutate, "COPIED", ("lightningrl", "tests"))
    monkeypatch.setattr(mutate, "MUTANTS", (caught, missed))
    assert mutate.main([]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == ["killed    sign (tests/test_sums.py)", "SURVIVED  order (tests/test_sums.py)", "1 of 2 mutants killed"]
    assert mutate.main(["--only=sign"]) == 0
    assert "a + b" in (tmp_path / "lightningrl" / "sums.py").read_text()
