"""The storeys of the house: who may import whom, read from the source, and what must stay free of JAX, seen at run time."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "lightningrl"

# A module, or everything under a folder, imports only what stands before it. `errors`, `metrics` and `flags` are edges that any
# storey may use; they know nothing of the rest.
ORDER = (
    "errors json_lines types rollout_bytes metrics flags tokenizer table tabulate tabulate_tree segments ratio normalize credit advantages "
    "losses recipe recipes packing model scaling sharding distributed train batches sampler evidence checkpoint policy policies "
    "gateway runtime tasks text_encoder warm_start lab manifest progress config start describe producers serving ahead loop fit show"
).split()
HOST_ONLY = ("errors", "json_lines", "types", "rollout_bytes", "metrics", "flags", "tokenizer", "gateway", "runtime", "tasks")


def sources(*folders: str) -> list[pathlib.Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def storey(module: str) -> str:
    """The part of `lightningrl.<storey>.…` that the order is about; empty for the package itself."""
    return (module.split(".") + [""])[1]


def dotted(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, also inside functions; `from lightningrl import x` counts as lightningrl.x."""
    package = dotted(path).split(".") if path.name == "__init__.py" else dotted(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def inside(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def forbidden(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of what the project does without."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="jax"), attr="tree_map"):
                yield node.lineno, "jax.tree_map"
            case ast.Attribute(value=ast.Name(id="flax"), attr="nnx"):
                yield node.lineno, "flax.nnx"
            case ast.Attribute(value=ast.Name(id="os"), attr="system" | "popen"):
                yield node.lineno, "a shell string"
            case ast.Call(func=ast.Name(id="eval" | "exec" as name)):
                yield node.lineno, name
            case ast.keyword(arg="shell", value=ast.Constant(value=True)):
                yield node.value.lineno, "a shell string"
            case ast.With(items=items) | ast.AsyncWith(items=items):
                for item in items:
                    if isinstance(item.context_expr, ast.Name | ast.Attribute) and ast.unparse(item.context_expr).endswith("mesh"):
                        yield node.lineno, "with mesh:"


def test_every_module_has_a_storey() -> None:
    unknown = {storey(dotted(path)) for path in sources("lightningrl")} - {"", *ORDER}
    assert not unknown, f"not in ORDER: {sorted(unknown)}"


@pytest.mark.parametrize("path", sources("lightningrl"), ids=dotted)
def test_a_module_imports_only_modules_above_it(path: pathlib.Path) -> None:
    here = storey(dotted(path))
    allowed = set(ORDER[: ORDER.index(here) + 1]) if here else set()
    wrong = []
    for line, module in imports(path):
        if inside(module, "experiments") or inside(module, "tests"):
            wrong.append((line, module))
        elif inside(module, "lightningrl") and storey(module) not in allowed | {"__version__"}:
            wrong.append((line, module))
    assert not wrong, f"{path.relative_to(ROOT)} imports from below: {wrong}"


def test_agents_know_nothing_of_the_library() -> None:
    wrong = [(path.name, line) for path in sources("experiments/agents") for line, name in imports(path) if inside(name, "lightningrl")]
    assert not wrong


@pytest.mark.parametrize("path", sources("lightningrl", "experiments", "scripts"), ids=dotted)
def test_names_that_the_project_does_without(path: pathlib.Path) -> None:
    found = list(forbidden(ast.parse(path.read_text(encoding="utf-8"))))
    found += [(line, name) for line, name in imports(path) if inside(name, "flax.nnx") or inside(name, "pickle") or name == "jax.tree_map"]
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "jax.tree_map(f, x)",
        "flax.nnx.Linear",
        "with mesh:\n    pass",
        "with self.mesh:\n    pass",
        "eval('1')",
        "exec('x = 1')",
        "os.system('ls')",
        "subprocess.run('ls', shell=True)",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert list(forbidden(ast.parse(source)))


@pytest.mark.parametrize("source", ["jax.tree.map(f, x)", "with jax.set_mesh(mesh):\n    pass", "policy.eval()", "run(['ls'])"])
def test_the_search_leaves_the_rest_alone(source: str) -> None:
    assert not list(forbidden(ast.parse(source)))


@pytest.mark.slow
def test_host_modules_load_without_jax() -> None:
    modules = [dotted(path) for path in sources("lightningrl") if storey(dotted(path)) in HOST_ONLY and path.stem != "__main__"]
    program = """
import importlib, sys
for name in ["lightningrl", *sys.argv[1:]]:
    importlib.import_module(name)
    if "jax" in sys.modules:
        sys.exit(f"importing {name} loads jax")
"""
    result = subprocess.run([sys.executable, "-c", program, *modules], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr


def test_public_names_are_where_the_package_says() -> None:
    import lightningrl

    assert dir(lightningrl) == lightningrl.__all__
    for name in lightningrl.__all__:
        assert getattr(lightningrl, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = lightningrl.nothing
