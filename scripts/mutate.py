"""Shows that the tests notice: small mistakes, one at a time, in a copy of the tree, each of which a named test file must catch.

python scripts/mutate.py                  # all of them; fails if one survives
python scripts/mutate.py --list           # what they are
python scripts/mutate.py --only=sign      # those with that in their name
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent
COPIED = ("lightningrl", "experiments", "scripts", "tests", "pyproject.toml")
LEFT_OUT = shutil.ignore_patterns("__pycache__", ".*_cache", ".hypothesis", "results")


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # stands once in the file
    new: str
    test: str


MUTANTS = (
    Mutant(
        "epsilon: group_normalize divides by σ alone",
        "lightningrl/normalize.py",
        "safe_divide(advantage, deviation + eps)",
        "safe_divide(advantage, deviation)",
        "tests/advantages/test_group.py",
    ),
    Mutant(
        "epsilon: the library's own is ten times as large",
        "lightningrl/segments.py",
        "EPSILON = 1e-6",
        "EPSILON = 1e-5",
        "tests/golden/test_verl_advantages.py",
    ),
    Mutant(
        "epsilon: TRL's preset has verl's",
        "lightningrl/advantages/presets.py",
        '"ddof": 1.0, "eps": 1e-4,',
        '"ddof": 1.0, "eps": 1e-6,',
        "tests/golden/test_trl.py",
    ),
    Mutant(
        "ddof: a segment's variance ignores it",
        "lightningrl/segments.py",
        "jnp.where(count > ddof, count - ddof, 1.0)",
        "jnp.where(count > ddof, count, 1.0)",
        "tests/test_segments.py",
    ),
    Mutant(
        "ddof: group_norm's default is 0",
        "lightningrl/advantages/group.py",
        "    ddof: float = 1.0,\n",
        "    ddof: float = 0.0,\n",
        "tests/advantages/test_group.py",
    ),
    Mutant(
        "ddof: HGPO's is that of the others",
        "lightningrl/credit/anchors.py",
        "    ddof: float = 0.0,\n",
        "    ddof: float = 1.0,\n",
        "tests/credit/test_anchors.py",
    ),
    Mutant(
        "singleton: a group of one keeps its reward",
        "lightningrl/normalize.py",
        'x if singleton == "raw" else 0.0',
        "x",
        "tests/test_rules.py",
    ),
    Mutant(
        "singleton: HGPO asks states that were seen once",
        "lightningrl/credit/anchors.py",
        "mask=table.valid)[ids] > 1",
        "mask=table.valid)[ids] > 0",
        "tests/credit/test_anchors.py",
    ),
    Mutant(
        "degenerate: a constant group is left to rounding",
        "lightningrl/normalize.py",
        "jnp.where(constant, 0.0, advantage)",
        "advantage",
        "tests/test_rules.py",
    ),
    Mutant(
        "degenerate: nearly equal counts as equal",
        "lightningrl/segments.py",
        "segment_min(values, ids, num_segments, mask=mask) == segment_max(values, ids, num_segments, mask=mask)",
        "segment_max(values, ids, num_segments, mask=mask) - segment_min(values, ids, num_segments, mask=mask) < 1e-6",
        "tests/test_segments.py",
    ),
    Mutant(
        "weights: every call counts one, not every rollout",
        "lightningrl/advantages/units.py",
        "jnp.where(table.valid, table.weight, 0.0)",
        "jnp.where(table.valid, 1.0, 0.0)",
        "tests/test_rules.py",
    ),
    Mutant(
        "leave-one-out: a call is left out, not its rollout",
        "lightningrl/normalize.py",
        "_baseline(x, ids, weights, units, center)\n    if",
        "_baseline(x, ids, weights, jnp.arange(size), center)\n    if",
        "tests/advantages/test_group.py",
    ),
    Mutant(
        "mask: a recursion starts anew at an observation",
        "lightningrl/segments.py",
        "carry = (jnp.where(used, value, following), jnp.where(used, id_, following_id))\n        return carry, carry[0]",
        "carry = (jnp.where(used, value, 0.0), jnp.where(used, id_, following_id))\n        return carry, carry[0]",
        "tests/test_segments.py",
    ),
    Mutant(
        "sign: GAE adds the value that it should take off",
        "lightningrl/credit/critic.py",
        "gamma * following - value",
        "gamma * following + value",
        "tests/credit/test_assigners.py",
    ),
    Mutant(
        "sign: k3 of the other direction",
        "lightningrl/losses/kl.py",
        "jnp.expm1(-d) + d",
        "jnp.expm1(d) - d",
        "tests/losses/test_kl_more.py",
    ),
    Mutant(
        "bound: PPO clips at 1 + εl above",
        "lightningrl/losses/policy.py",
        "1.0 + clip_high)",
        "1.0 + clip_low)",
        "tests/losses/test_per_token.py",
    ),
    Mutant(
        "bound: the dual clip also caps where A > 0",
        "lightningrl/losses/policy.py",
        "capped = (advantage < 0) & (loss > -dual_clip * advantage)",
        "capped = loss > -dual_clip * advantage",
        "tests/losses/test_per_token.py",
    ),
    Mutant(
        "bound: log-ratios are clamped at ±30",
        "lightningrl/ratio.py",
        "MAX_LOG_RATIO = 20.0",
        "MAX_LOG_RATIO = 30.0",
        "tests/test_rules.py",
    ),
    Mutant(
        "denominator: rollout_mean counts calls",
        "lightningrl/losses/aggregation.py",
        "_share(mask, counts.rollout_tokens)",
        "_share(mask, counts.sequence_tokens)",
        "tests/losses/test_aggregation.py",
    ),
)


def copy_tree(target: pathlib.Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=LEFT_OUT)
        else:
            shutil.copy(source, target / name)


def run_test(tree: pathlib.Path, test: str) -> subprocess.CompletedProcess[str]:
    """pytest in the copy, which stands before an installed package."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test]
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)


def mutated(mutant: Mutant, source: str) -> str:
    if source.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} has {source.count(mutant.old)} times what {mutant.name!r} changes: mend the mutant")
    return source.replace(mutant.old, mutant.new)


def verdict_of(tree: pathlib.Path, mutant: Mutant) -> str:
    """`killed`, `SURVIVED`, or what else happened."""
    path = tree / mutant.file
    source = path.read_text(encoding="utf-8")
    path.write_text(mutated(mutant, source), encoding="utf-8")
    try:
        done = run_test(tree, mutant.test)
    finally:
        path.write_text(source, encoding="utf-8")
    return {0: "SURVIVED", 1: "killed"}.get(done.returncode, f"BROKEN, pytest said\n{done.stdout[-2000:]}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants with this in their name")
    given = parser.parse_args(arguments)
    chosen = [mutant for mutant in MUTANTS if given.only in mutant.name]
    if not chosen:
        parser.error(f"no mutant has {given.only!r} in its name; see --list")
    if given.list:
        for mutant in chosen:
            print(f"{mutant.name}\n    {mutant.file}, caught by {mutant.test}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder)
        copy_tree(tree)
        for test in dict.fromkeys(mutant.test for mutant in chosen):
            done = run_test(tree, test)
            if done.returncode != 0:
                print(f"{test} fails without any mutant:\n{done.stdout[-2000:]}", file=sys.stderr)
                return 2
        survivors = 0
        for mutant in chosen:
            verdict = verdict_of(tree, mutant)
            survivors += verdict != "killed"
            print(f"{verdict:<9} {mutant.name} ({mutant.test})", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
