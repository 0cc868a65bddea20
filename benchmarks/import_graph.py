"""The import graph of rlkd: `python benchmarks/import_graph.py` prints it and fails on an upward arrow.

A unit is a folder of `rlkd/`, or a file directly in it. `LEVELS` lists the units from the bottom up:
each may import only from units listed before it. Imports inside functions and under `TYPE_CHECKING` count too.
`make lint` runs this script, and docs/architecture.md describes the units.
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "rlkd"
LEVELS = (
    "console",
    "distributed",
    "stream",
    "storage",
    "raised",
    "plugins",
    "config",
    "losses",
    "builtin",
    "metrics",
    "rewards",
    "servers",
    "types",
    "data",
    "models",
    "weight_sync",
    "generation",
    "teachers",
    "algorithms",
    "config_file",
    "runs",
    "command_line",
    "pipeline",
    "training",
    "reporting",
    "run",
    "planning",
    "report",
    "evaluate",
    "generate",
    "push",
    "serve",
    "estimate",
    "train",
    "cli",
    "__main__",
)
PUBLIC = {"rlkd.algorithms": "public names of algorithms"}
"""Packages whose `__init__` only exports names of other units, which it imports on first access. It is above all units,
while its folder is at its place in `LEVELS`: `rlkd.algorithms.GRPO` is a LightningModule made in `training`, and
`rlkd.algorithms.grpo` is below that. Nothing in rlkd may import such a name."""


def unit(module: str) -> str:
    """The unit of a dotted module name: `rlkd.data.chat` → `data`."""
    if module in PUBLIC:
        return PUBLIC[module]
    return module.split(".")[1] if "." in module else ""


def modules(package: Path) -> dict[str, Path]:
    """Dotted name → file, of every module of the package."""
    found = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> Iterator[tuple[str, int]]:
    """(module, line) of every import of the package in `file`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names if name.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for name in node.names:
                submodule = f"{node.module}.{name.name}"
                if submodule in known or node.module in known:
                    yield (submodule if submodule in known else node.module), node.lineno


def arrows(package: Path = PACKAGE) -> dict[tuple[str, str], list[str]]:
    """(importing unit, imported unit) → where, as `file:line imports module`."""
    known = modules(package)
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for module, file in known.items():
        for imported, line in imports(file, known):
            if unit(module) != unit(imported) and unit(module) and unit(imported):
                place = f"{file.relative_to(package.parent)}:{line}"
                found[unit(module), unit(imported)].append(f"{place} imports {imported}")
    return dict(found)


def dangling(package: Path = PACKAGE) -> list[str]:
    """Imports of a module that the package does not have. Another install might answer them."""
    known = modules(package)
    found = []
    for file in known.values():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            missing = [n for n in names if n.split(".")[0] == package.name and n not in known]
            found += [f"{file.relative_to(package.parent)}:{node.lineno} imports {name}" for name in missing]
    return found


def circles(found: dict[tuple[str, str], list[str]]) -> list[list[str]]:
    """Groups of units that import one another, directly or through others."""
    reach = {start: {b for a, b in found if a == start} for start in {u for pair in found for u in pair}}
    for middle in reach:
        for start in reach:
            if middle in reach[start]:
                reach[start] |= reach[middle]
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in reach if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def main() -> int:
    """Print the counts, then every fault. Returns: 1 if there is any fault, else 0."""
    package = Path(sys.argv[1]) if len(sys.argv) > 1 else PACKAGE
    found = arrows(package)
    units = sorted({unit(module) for module in modules(package)} - {""})
    rank = {name: place for place, name in enumerate((*LEVELS, *PUBLIC.values()))}
    upward = {pair: places for pair, places in found.items() if rank.get(pair[0], -1) < rank.get(pair[1], 10**6)}
    unlisted = [name for name in units if name not in rank]
    loops = circles(found)
    print(f"{len(units)} units, {len(found)} arrows, {len(upward)} upward, {len(loops)} circles")
    for (above, below), places in sorted(upward.items()):
        print(f"upward: {above} -> {below}: " + "; ".join(places))
    for loop in loops:
        print("circle: " + ", ".join(loop))
    for name in unlisted:
        print(f"unlisted: {name}; add it to LEVELS in benchmarks/import_graph.py")
    lost = dangling(package)
    for line in lost:
        print(f"missing: {line}, which does not exist")
    return 1 if upward or loops or unlisted or lost else 0


if __name__ == "__main__":
    sys.exit(main())
