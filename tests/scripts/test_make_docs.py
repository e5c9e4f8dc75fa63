"""The page made of the docstrings: that it is up to date, and that what it links to is there."""

from __future__ import annotations

import inspect
import re
import types

import pytest

from lightningrl import advantages, credit, losses, recipes
from scripts import make_docs


@pytest.fixture(scope="module")
def page() -> str:
    return make_docs.page()


def test_the_page_is_what_the_docstrings_say():
    assert make_docs.main(["--check"]) == 0, "run python scripts/make_docs.py"


def test_a_stale_or_missing_page_fails_the_check_and_writing_it_mends_it(tmp_path, capsys):
    path = tmp_path / "docs" / "algorithms.md"
    for stale in (None, "# Algorithms\n"):
        if stale:
            path.write_text(stale)
        assert make_docs.main(["--check", "--page", str(path)]) == 1
        assert capsys.readouterr().err == f"{path} is not what the docstrings say: run python scripts/make_docs.py\n"
        assert path.exists() == bool(stale)
        assert make_docs.main(["--page", str(path)]) == 0
    assert make_docs.main(["--check", "--page", str(path)]) == 0


def test_every_public_function_and_recipe_is_there(page):
    for package in (credit, advantages, losses):
        for name in package.__all__:
            if isinstance(getattr(package, name), types.FunctionType):
                assert f"\n#### {package.__name__.split('.')[-1]}.{name}\n" in page
    for recipe in recipes.RECIPES.values():
        assert f"\n| `{recipe.name}` | " in page and f"| {recipe.use_when} |" in page


def test_every_link_within_the_page_has_its_heading(page):
    headings = [make_docs.slug(title) for title in re.findall(r"^#+ (.+)$", page, re.MULTILINE)]
    assert len(set(headings)) == len(headings)
    links = set(re.findall(r"\]\(#([^)]+)\)", page))
    assert links and links <= set(headings)


def test_no_paper_is_left_without_its_link(page):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?<![/\w\[])\d{4}\.\d{5}", re.sub(r"\[[^\]]*\]\(https://arxiv.org/abs/\d{4}\.\d{5}\)", "", prose))
    assert "[arXiv 2505.10978](https://arxiv.org/abs/2505.10978)" in page


def test_markdown_is_well_formed(page):
    assert page.count("```") % 2 == 0
    for rows in re.findall(r"(?:^\|.*\|\n)+", page, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows.splitlines()}) == 1
    assert " at 0x" not in page


def example(
    table: int,
    *,
    gamma: float = 0.5,
    baseline: credit.anchors.Variant = "paper",
) -> float:
    """Does `reward_to_go` (arXiv 2508.03680, §3) and 2509.19199.

      a = b
        + c | d

    More, where x < y.

    Args:
      table: N transitions; reads
        `reward`.
      gamma, baseline: of it.

    Returns:
      f32[N].

    Raises:
      ValueError: never.
    """


def test_a_docstring_becomes_markdown():
    entry = make_docs.Entry("credit", "credit.example", "example", example)
    assert make_docs.function_text(entry, make_docs.entries()) == inspect.cleandoc("""
        Does [`reward_to_go`](#creditreward_to_go) ([arXiv 2508.03680](https://arxiv.org/abs/2508.03680), §3) and [2509.19199](https://arxiv.org/abs/2509.19199).

        ```text
        a = b
          + c | d
        ```

        More, where x < y.

        **Args**

        - `table`: N transitions; reads `reward`.
        - `gamma`, `baseline`: of it.

        **Returns** f32[N].

        **Raises**

        - `ValueError`: never.
        """)  # noqa: E501
    assert make_docs.signature(example) == (
        'example(table: int, *, gamma: float = 0.5, baseline: Literal["paper", "code"] = "paper") -> float'
    )
    assert make_docs.signature(credit.gigpo).startswith("gigpo(\n    table: TransitionTable,\n    evidence: Evidence,\n    *,\n")


def test_evidence_names_who_reads_it():
    table = make_docs.evidence_table(make_docs.entries())
    assert "| `judge` | float32 [N], score of the transition from outside | [credit.judged](#creditjudged) |" in table
