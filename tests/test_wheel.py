"""What an installation outside the checkout gets."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, since a build leaves its traces beside the sources; without a compiler, as some users have it."""
    folder = tmp_path_factory.mktemp("wheel")
    wanted = ("src", "csrc", "recipes", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE")
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "*.egg-info", "__pycache__")
            shutil.copytree(source, folder / "source" / name, ignore=ignore)
        elif source.exists():
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(source, folder / "source" / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    no_compiler = os.environ | {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        [*command, str(folder / "source")], env=no_compiler, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_carries_every_module_recipe_and_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT / "src")) for path in (ROOT / "src").rglob("*.py")}
    recipes = {f"volo/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert modules <= names
    assert recipes <= names
    assert {name.rpartition("/")[2] for name in names} >= {"LICENSE", "NOTICE", "entry_points.txt"}
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/")) or name.endswith(".so")]


def test_recipes_are_found_where_only_the_wheel_is(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from volo.config import find_recipe, load_recipe\n"
        "print(find_recipe('recipes/imagenet_volo_d1_224.toml'), load_recipe('imagenet_volo_d1_224').model.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [str(tmp_path / "volo" / "recipes" / "imagenet_volo_d1_224.toml"), "volo_d1"], (
        done.stderr
    )
