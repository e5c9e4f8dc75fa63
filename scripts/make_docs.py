"""Writes docs/algorithms.md from the docstrings: every recipe, and every public function of credit, advantages and losses.

python scripts/make_docs.py            # writes the page
python scripts/make_docs.py --check    # fails if the page is not what the docstrings say
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import json
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Sequence

from lightningrl import advantages, credit, losses, normalize, recipes
from lightningrl.recipe import Recipe, describe
from lightningrl.table import Evidence

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "algorithms.md"
PACKAGES = {"credit": "Credit", "advantages": "Advantages", "losses": "Losses and aggregations"}
SECTIONS = ("Args:", "Returns:", "Raises:")
WIDTH = 110  # of a signature on one line

INTRODUCTION = """\
<!-- Written by scripts/make_docs.py from the docstrings: change those, and run it again. -->
# Algorithms

What the library computes, with where it is from. A recipe puts together a credit, an advantage, a spread over tokens, a loss and an
aggregation; each of those is a pure function with settings as keyword arguments, fixed by `functools.partial`.

Notation: N transitions (LLM calls), E edges (action tokens), R rollouts, D named outcomes; `f32[N]` is a float32 array of N numbers. t
counts turns, k tokens; r is a reward, R a rollout's outcome, G a return, V a value, A an advantage, π a policy.
"""


@dataclasses.dataclass(frozen=True)
class Entry:
    """A public function and where it stands."""

    package: str
    module: str
    name: str
    function: Callable

    @property
    def title(self) -> str:
        return f"{self.package}.{self.name}"

    @property
    def link(self) -> str:
        return f"#{slug(self.title)}"


def entries() -> list[Entry]:
    """Every public function, by package, module in order of the alphabet, and name."""
    found = [Entry("normalize", "normalize", "group_normalize", normalize.group_normalize)]
    for package in (credit, advantages, losses):
        for name in package.__all__:
            value = getattr(package, name)
            if isinstance(value, types.FunctionType):
                home = value.__module__.removeprefix("lightningrl.")
                found.append(Entry(home.split(".")[0], home, name, value))
    return sorted(found, key=lambda e: (e.module, e.name))


def page() -> str:
    every = entries()
    parts = [INTRODUCTION, *contents(every), "## Recipes", recipe_table()]
    for package, title in PACKAGES.items():
        parts += [f"## {title}", prose(documentation(importlib.import_module(f"lightningrl.{package}")), package, every)]
        if package == "advantages":
            parts += module_parts("normalize", every)
        for module in modules_of(package, every):
            parts += module_parts(module, every)
    parts += ["## Evidence", evidence_table(every)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def modules_of(package: str, every: Sequence[Entry]) -> list[str]:
    return sorted({e.module for e in every if e.package == package})


def contents(every: Sequence[Entry]) -> Iterator[str]:
    lines = ["- [Recipes](#recipes): " + ", ".join(recipes.RECIPES)]
    for package, title in PACKAGES.items():
        lines.append(f"- [{title}](#{slug(title)})")
        for module in [*(["normalize"] if package == "advantages" else []), *modules_of(package, every)]:
            links = ", ".join(f"[{e.name}]({e.link})" for e in every if e.module == module)
            lines.append(f"  - {module.split('.')[-1].replace('_', ' ')}: {links}")
    lines.append("- [Evidence](#evidence): what the rollouts alone don't say")
    yield "\n".join(lines)


def recipe_table() -> str:
    """Every recipe; settings that are the functions' defaults are left out."""

    def row(recipe: Recipe) -> list[str]:
        advantage, loss = code(recipe.advantage), code(recipe.loss)
        if recipe.spread is not advantages.broadcast:
            advantage += f", over tokens by {code(recipe.spread)}"
        if recipe.select is not None:
            loss += f", of what {code(recipe.select)} says of the whole batch"
        if recipe.kl is not None:
            loss += f" + {recipe.kl_coef} {code(recipe.kl)}"
        if recipe.critic_target is not None:
            loss += f" + {recipe.value_coef} {code(recipe.value_loss)} towards {code(recipe.critic_target)}"
        if recipe.entropy_coef:
            loss += f" - {recipe.entropy_coef} entropy"
        needs = ", ".join(f"`{need}`" for need in recipe.needs)
        if recipe.branches is not None:
            needs = f"branches at {recipe.branches.points} of a rollout's calls, {recipe.branches.width} at each"
        return [
            f"`{recipe.name}`",
            linked(recipe.arxiv),
            recipe.use_when,
            code(recipe.credit),
            advantage,
            loss,
            code(recipe.aggregation),
            needs,
        ]

    columns = ("recipe", "arXiv", "use it when", "credit", "advantage", "loss", "aggregation", "needs")
    return table(columns, map(row, recipes.RECIPES.values()))


def code(stage: Callable) -> str:
    return f"`{describe(stage)}`"


def preset_table() -> str:
    rows = (
        [f"`{name}`", "`" + ", ".join(f"{key}={value!r}" for key, value in settings.items()) + "`", advantages.PRESET_ORIGINS[name]]
        for name, settings in advantages.PRESETS.items()
    )
    return table(("preset", "settings", "origin"), rows)


def evidence_table(every: Sequence[Entry]) -> str:
    """The fields with the comments behind them, and who reads each."""
    comments = dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(Evidence), re.MULTILINE))

    def readers(field: str) -> str:
        return ", ".join(f"[{e.title}]({e.link})" for e in every if f"`{field}`" in evidence_argument(e.function))

    names = [field.name for field in dataclasses.fields(Evidence)]
    text = prose(documentation(Evidence), "", every)
    return text + "\n\n" + table(("field", "what it is", "read by"), ([f"`{n}`", linked(comments[n]), readers(n)] for n in names))


def evidence_argument(function: Callable) -> str:
    """What the docstring says of the argument `evidence`."""
    for name, text in sections(documentation(function)):
        if name == "Args:":
            return next((entry for entry in split_entries(text) if entry.startswith("evidence:")), "")
    return ""


def module_parts(module: str, every: Sequence[Entry]) -> Iterator[str]:
    """The module's docstring and its functions."""
    package = module.split(".")[0]
    first, _, rest = documentation(importlib.import_module(f"lightningrl.{module}")).partition("\n")
    yield f"### {linked(first.rstrip('.:'))}"
    yield f"`lightningrl/{module.replace('.', '/')}.py`"
    if rest.strip():
        yield prose(rest.strip("\n"), package, every)
    for entry in every:
        if entry.module == module:
            yield f"#### {entry.title}"
            yield f"```python\n{signature(entry.function)}\n```"
            yield function_text(entry, every)
    if module == advantages.preset.__module__.removeprefix("lightningrl."):
        yield preset_table()


def function_text(entry: Entry, every: Sequence[Entry]) -> str:
    others = [e for e in every if e != entry]
    parts = []
    for name, text in sections(documentation(entry.function)):
        if name in ("Args:", "Raises:"):
            items = [argument(item, entry.package, others) for item in split_entries(text)]
            parts.append(f"**{name.rstrip(':')}**\n\n" + "\n".join(f"- {item}" for item in items))
        elif name == "Returns:":
            parts.append(f"**Returns** {prose(text, entry.package, others)}")
        else:
            parts.append(prose(text, entry.package, others))
    return "\n\n".join(parts)


def signature(function: Callable) -> str:
    """As it is called, with defaults; a setting that is one of a few names shows them."""
    hints = typing.get_type_hints(function)
    described = inspect.signature(function)
    shown = []
    for parameter in described.parameters.values():
        hint, annotation, default = hints[parameter.name], parameter.annotation, parameter.default
        if typing.get_origin(hint) is typing.Literal:
            annotation = f"Literal[{', '.join(map(quoted, typing.get_args(hint)))}]"
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(f"{parameter.name}: {annotation}" + ("" if default is parameter.empty else f" = {quoted(default)}"))
    name, returns = function.__name__, described.return_annotation
    line = f"{name}({', '.join(shown)}) -> {returns}"
    return line if len(line) <= WIDTH else "\n".join([f"{name}(", *(f"    {text}," for text in shown), f") -> {returns}"])


def quoted(value: object) -> str:
    if isinstance(value, str):
        return json.dumps(value)
    return describe(value) if callable(value) else repr(value)


def sections(docstring: str) -> list[tuple[str, str]]:
    """[("", text), ("Args:", text), …], each dedented."""
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in docstring.splitlines():
        if line in SECTIONS:
            found.append((line, []))
        elif line and not line.startswith(" ") and found[-1][0]:  # prose after a section
            found.append(("", [line]))
        else:
            found[-1][1].append(line)
    return [(name, textwrap.dedent("\n".join(lines)).strip("\n")) for name, lines in found]


def split_entries(text: str) -> list[str]:
    """The entries of an argument list: a line that is not indented starts one."""
    items: list[str] = []
    for line in text.splitlines():
        if line.startswith(" ") and items:
            items[-1] += " " + line.strip()
        elif line:
            items.append(line)
    return items


def argument(item: str, package: str, every: Sequence[Entry]) -> str:
    names, colon, text = item.partition(": ")
    if not colon:
        return marked(item, package, every)
    return f"{', '.join(f'`{name.strip()}`' for name in names.split(','))}: {marked(text, package, every)}"


def prose(text: str, package: str, every: Sequence[Entry]) -> str:
    """Paragraphs in one line each; what is indented, which is formulas and examples, as it stands."""
    parts: list[str] = []
    for indented, lines in blocks(text):
        if indented:
            parts.append("```text\n" + textwrap.dedent("\n".join(lines)) + "\n```")
        else:
            parts.append(marked(" ".join(lines), package, every))
    return "\n\n".join(parts)


def blocks(text: str) -> Iterator[tuple[bool, list[str]]]:
    """(indented, lines) of what blank lines or a change of indentation part; indented blocks keep blank lines within."""
    current: list[str] = []
    for line in [*text.splitlines(), ""]:
        indented = line.startswith(" ")
        if current and (not line or indented != current[0].startswith(" ")):
            yield current[0].startswith(" "), current
            current = []
        if line:
            current.append(line)


def marked(text: str, package: str, every: Sequence[Entry]) -> str:
    """Links to papers and to the functions that are named in backticks, those of the same package first."""
    names = {e.name: e for e in every} | {e.name: e for e in every if e.package == package}

    def name_link(match: re.Match[str]) -> str:
        entry = names.get(match[1].removeprefix("normalize."))
        return f"[{match[0]}]({entry.link})" if entry else match[0]

    pieces = re.split(r"(`[^`]*`)", text)
    return "".join(re.sub(r"`([\w.]+)`", name_link, p) if p.startswith("`") else re.sub(r"<(?=[\w/!])", "&lt;", linked(p)) for p in pieces)


def linked(text: str) -> str:
    return re.sub(r"(?:arXiv )?\b(\d{4}\.\d{5})\b", lambda m: f"[{m[0]}](https://arxiv.org/abs/{m[1]})", text)


def table(columns: Sequence[str], rows: typing.Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def slug(title: str) -> str:
    """The anchor that Markdown renderers give a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def documentation(thing: object) -> str:
    text = inspect.getdoc(thing)
    if not text:
        raise SystemExit(f"{thing} has no docstring")
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is stale")
    parser.add_argument("--page", type=pathlib.Path, default=PAGE, help="where it is")
    given = parser.parse_args(arguments)
    text = page()
    if not given.check:
        given.page.parent.mkdir(parents=True, exist_ok=True)
        given.page.write_text(text, encoding="utf-8")
        return 0
    if given.page.exists() and given.page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{given.page} is not what the docstrings say: run python scripts/make_docs.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
