"""Tests of the import order in gateway/: a package imports only from lower layers, and there are no cycles.

Imports in functions and under ``if TYPE_CHECKING`` count, too.
"""

from __future__ import annotations

import ast
from pathlib import Path

from twisted.trial.unittest import SynchronousTestCase

import gateway

ROOT = Path(gateway.__file__).parent

#: Layers from bottom to top. A package imports from lower layers and from itself, but not from other packages of its
#: layer. Modules directly in gateway/ count as packages.
LAYERS = (
    ("util",),
    ("settings", "metrics"),
    ("net", "protocol", "registry", "twistd"),
    ("websocket", "auth", "cloud"),
    ("clients", "agent"),
    ("rpc", "testing"),
    ("cluster",),
    ("api",),
    ("components",),
    ("node",),
    ("tap", "demo"),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    parts = ("gateway", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """Return the package or module directly below ``gateway``, or an empty string for ``gateway`` itself."""
    return module.split(".")[1] if "." in module else ""


def imports_of(source: str, modules: frozenset[str]) -> set[str]:
    """Return those of ``modules`` that a source imports, at any place in it."""
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports are absolute"  # noqa: PT018
            submodules = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            imported |= submodules
            if len(submodules) < len(node.names):
                imported.add(node.module)
    return imported & modules


def import_graph() -> dict[str, set[str]]:
    sources = {module_name(path): path.read_text() for path in ROOT.rglob("*.py")}
    modules = frozenset(sources)
    return {module: imports_of(source, modules) - {module} for module, source in sources.items()}


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of one cycle in order, or an empty list."""
    done: set[str] = set()
    for start in sorted(graph):
        path: list[str] = []
        stack = [(start, iter(sorted(graph[start])))]
        path.append(start)
        while stack and start not in done:
            module, following = stack[-1]
            target = next((name for name in following if name not in done), None)
            if target is None:
                done.add(module)
                stack.pop()
                path.pop()
            elif target in path:
                return path[path.index(target) :]
            else:
                path.append(target)
                stack.append((target, iter(sorted(graph[target]))))
    return []


class ImportOrderTests(SynchronousTestCase):
    def test_every_module_has_a_layer(self) -> None:
        packages = {package_of(module) for module in import_graph()} - {""}
        self.assertEqual(packages, set(LEVEL))

    def test_nothing_imports_a_higher_layer(self) -> None:
        violations = [
            f"{module} imports {target}"
            for module, targets in sorted(import_graph().items())
            for target in sorted(targets)
            if package_of(module) != package_of(target)
            and target != "gateway"
            and (module == "gateway" or LEVEL[package_of(target)] >= LEVEL[package_of(module)])
        ]
        self.assertEqual(violations, [])

    def test_there_are_no_cycles(self) -> None:
        self.assertEqual(find_cycle(import_graph()), [])

    def test_protocol_imports_no_twisted(self) -> None:
        for path in (ROOT / "protocol").glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                self.assertFalse([name for name in names if name.split(".")[0] in ("twisted", "autobahn")], path)


class FindCycleTests(SynchronousTestCase):
    def test_no_cycle(self) -> None:
        self.assertEqual(find_cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}), [])

    def test_one_cycle(self) -> None:
        self.assertEqual(find_cycle({"a": {"b"}, "b": {"c"}, "c": {"d"}, "d": {"b"}}), ["b", "c", "d"])

    def test_imports_in_functions_and_under_type_checking_count(self) -> None:
        source = "if TYPE_CHECKING:\n    from gateway.b import x\ndef f():\n    from gateway import c\n"
        modules = frozenset({"gateway", "gateway.b", "gateway.c"})
        self.assertEqual(imports_of(source, modules), {"gateway.b", "gateway.c"})
