"""How hard a query is by the rule of Spider's official evaluation (arXiv 1809.08887, §4): components are counted.

The official code counts on a full parse tree; here the clauses are told apart by their keywords at each depth of
parentheses, which counts the same things.
"""

from __future__ import annotations

import re

_WORD = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|[\w.]+|<=|>=|!=|<>|[^\s\w]")
_AGGREGATES = frozenset(("max", "min", "count", "sum", "avg"))
_CLAUSES = ("select", "from", "where", "group", "having", "order", "limit")
_SETS = frozenset(("union", "intersect", "except"))


def hardness(sql: str) -> str:
    """`easy`, `medium`, `hard` or `extra`."""
    clauses, parts = _clauses([token.lower() for token in _WORD.findall(sql)])
    words = {name: [token for token in tokens if isinstance(token, str)] for name, tokens in clauses.items()}
    conditions = words["from"] + words["where"] + words["having"]
    joins = words["from"].count("join") + words["from"].count(",")
    first = sum(bool(clauses[name]) for name in ("where", "group", "order", "limit"))
    first += joins + conditions.count("or") + conditions.count("like")
    nested = parts + sum(isinstance(token, list) and "select" in token[:1] for name in ("where", "having") for token in clauses[name])
    others = _others(clauses, words)
    if first <= 1 and others == 0 and nested == 0:
        return "easy"
    if nested == 0 and ((others <= 2 and first <= 1) or (first <= 2 and others < 2)):
        return "medium"
    if (nested == 0 and ((others > 2 and first <= 2) or (2 < first <= 3 and others <= 2))) or (first <= 1 and others == 0 and nested <= 1):
        return "hard"
    return "extra"


def _others(clauses: dict[str, list], words: dict[str, list[str]]) -> int:
    aggregates = sum(word in _AGGREGATES for name in ("select", "order") for word in words[name])
    # The official count takes a negation, and every condition of HAVING after the first, for an aggregate.
    aggregates += words["where"].count("not") + words["having"].count("and") + words["having"].count("or")
    conditions = 1 + words["where"].count("and") + words["where"].count("or") - words["where"].count("between")
    return (aggregates > 1) + (words["select"].count(",") > 0) + (conditions > 1) + (words["group"].count(",") > 0)


def _clauses(tokens: list[str]) -> tuple[dict[str, list], int]:
    """The clauses of the first SELECT at depth 0, parentheses as lists, and the number of set operations."""
    root: list = []
    stack = [root]
    for token in tokens:
        if token == "(":
            stack[-1].append([])
            stack.append(stack[-1][-1])
        elif token == ")" and len(stack) > 1:
            stack.pop()
        else:
            stack[-1].append(token)
    clauses: dict[str, list] = {name: [] for name in _CLAUSES}
    current, parts = "select", 0
    for token in root:
        if isinstance(token, str) and token in _SETS:
            parts += 1
            break
        if isinstance(token, str) and token in _CLAUSES:
            current = token
        clauses[current].append(token)
    return clauses, parts
