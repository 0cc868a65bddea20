"""The files, links and Python names in the documentation exist."""

import ast
import re
from pathlib import Path

import pytest

from rlkd.config_file import help_text, sections

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").exists())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Made-up names in "How to add an algorithm".
PLACEHOLDERS = {
    "rlkd.data_sources",
    "rlkd.samplers",
    "rlkd/algorithms/mine.py",
    "rlkd/algorithms/mine_options.py",
    "rlkd.algorithms.Mine",
    "configs/mine.yaml",
    "teacher.write",  # a method of the argument `teacher`
}


def missing_paths(text: str) -> list[str]:
    """Paths from the root, and names of test files in any folder, that do not exist."""
    paths = re.findall(r"(?<![\w/.])(?:rlkd|tests|docs|configs|launch|benchmarks)/[\w*./-]*\w", text)
    tests = re.findall(r"(?<![\w/])test_\w+\.py", text)
    missing = [path for path in paths if path not in PLACEHOLDERS and not list(ROOT.glob(path))]
    return missing + [name for name in tests if not list((ROOT / "tests").rglob(name))]


def missing_links(page: Path, text: str) -> list[str]:
    """Relative links to files that do not exist."""
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    return [link for link in links if not (page.parent / link).exists()]


def bound(module: Path) -> set[str]:
    """The names bound at a module's top level, also under an `if`, and those in its `__all__`."""
    names: set[str] = set()
    body = ast.parse(module.read_text(encoding="utf-8")).body
    for node in body + [inner for branch in body if isinstance(branch, ast.If) for inner in branch.body]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            assigned = {target.id for target in targets if isinstance(target, ast.Name)}
            names |= assigned | (set(ast.literal_eval(node.value)) if "__all__" in assigned else set())
    return names


def exists(dotted: str) -> bool:
    """Whether `rlkd.x.y` is a module, or a name bound in one."""
    place = ROOT
    parts = dotted.split(".")
    for i, part in enumerate(parts):
        if (place / part).is_dir():
            place = place / part
        elif (place / f"{part}.py").exists():
            place = place / f"{part}.py"
        else:
            module = place / "__init__.py" if place.is_dir() else place
            return i + 1 >= len(parts) - 1 and part in bound(module)  # at most an attribute of the name follows
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    text = page.read_text(encoding="utf-8")
    dotted = set(re.findall(r"(?<![\w./])rlkd(?:\.\w+)+", text))
    assert missing_paths(text) == []
    assert missing_links(page, text) == []
    assert sorted(name for name in dotted - PLACEHOLDERS if not exists(name)) == []


def unknown_keys(text: str) -> list[str]:
    """Keys of the configuration in backticks, such as `optim.lr` or `optim.lr=1e-5`, that no algorithm has."""
    keys = {key for line in help_text().splitlines() for key in re.findall(r"^  ([\w.\[\]]+):", line)}
    known = {re.sub(r"\[\]", "", key) for key in keys}
    known |= {key.rsplit(".", i)[0] for key in known for i in range(1, key.count("."))}  # sections in sections
    named = re.findall(rf"`((?:{'|'.join(name for name, _ in sections())})(?:\.\w+)+)(?=[`=:])", text)
    return sorted({key for key in named if key not in known and key not in PLACEHOLDERS})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_keys_that_a_page_names_exist(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    if page.name == "migrating.md":  # the keys of others are in the columns before the last
        lines = [line.rsplit("|", 2)[-2] if line.startswith("| ") else line for line in lines]
    assert unknown_keys("\n".join(lines)) == []


def test_the_table_of_folders_has_the_order_of_the_import_graph():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (`rlkd/.*?) \|", page, re.MULTILINE)
    listed = [re.sub(r"rlkd/|/|\.py", "", name) for row in rows for name in re.findall(r"`(.*?)`", row)]
    script = (ROOT / "benchmarks" / "import_graph.py").read_text(encoding="utf-8")
    (levels,) = re.findall(r"^LEVELS = (\(.*?\))$", script, re.MULTILINE | re.DOTALL)
    assert tuple(listed) == ast.literal_eval(levels)


def test_a_wrong_name_is_found():
    assert missing_paths("`rlkd/rollout/parts.py`, `rlkd/types.py`, `test_of_nothing.py`") == [
        "rlkd/rollout/parts.py",
        "test_of_nothing.py",
    ]
    assert unknown_keys("`optim.lr`, `optim.lr=1`, `optim.rate`, `rollout.server`, `reward.functions`") == [
        "optim.rate"
    ]
    assert exists("rlkd.types.Batch.rows") and exists("rlkd.losses") and exists("rlkd.models.lora.layers")
    assert not exists("rlkd.types.Bunch") and not exists("rlkd.rollout.parts")
