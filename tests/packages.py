"""Installed packages, as far as Python's import system and `importlib.metadata` see of them."""

from collections.abc import Mapping
from pathlib import Path


def install(
    site: Path, name: str, declared: Mapping[str, Mapping[str, str]], source: str = "", version: str = "1.0"
) -> None:
    """Install a package into the folder `site`.

    Args:
        declared: group of entry points → name → value.
        source: of its module, which is called like the package, with underscores.
    """
    module = site / name.replace("-", "_")
    module.mkdir()
    (module / "__init__.py").write_text(source)
    (module / "parts.py").write_text(source)
    info = site / f"{module.name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = []
    for group, names in declared.items():
        sections += [f"[{group}]", *(f"{key} = {value}" for key, value in names.items())]
    (info / "entry_points.txt").write_text("\n".join(sections))
