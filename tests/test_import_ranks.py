"""Modules import lower ranks only, so that data flows one way and nothing has to know who uses it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import volo

SOURCE = Path(volo.__file__).resolve().parent

# Units of one line do not import one another. The package itself (`from volo import ...`) offers what users need of all
# of them, so that it stands above; its version is for everybody.
LINES = [
    ("ops", "config"),
    ("layers",),
    ("data",),
    ("models",),
    ("distributed",),
    ("tasks",),
    ("inference",),
    ("annotation",),
    ("training", "explain"),
    ("deploy",),
    ("bench",),
    ("cli",),
    ("__init__",),
    ("__main__",),
]
RANK = {unit: rank for rank, units in enumerate(LINES) for unit in units}
MODULES = sorted(SOURCE.rglob("*.py"))


def unit_of(path: Path) -> str:
    """The first folder or module under the package: "models" for models/volo.py, "layers" for layers.py."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_names(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of what `source` imports of this package; inside functions and `if TYPE_CHECKING`, too."""
    package = ["volo", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and node.args:
            names = [node.args[0].value] if isinstance(node.args[0], ast.Constant) else []
        for name in names:
            if name.partition(".")[0] == "volo" and name != "volo.__version__":
                yield node.lineno, name


def imported_units(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """(line, unit) of every import of this package in `source`."""
    for line, name in imported_names(path, source):
        parts = name.split(".")
        is_module = len(parts) > 1 and ((SOURCE / parts[1]).is_dir() or (SOURCE / f"{parts[1]}.py").is_file())
        yield line, parts[1] if is_module else "__init__"


def imported_modules(path: Path, source: str) -> set[Path]:
    """The files behind the imports of `source`: `from volo.models import volo` names one, as does `volo.models.volo.VOLO`."""
    files = set()
    for _, name in imported_names(path, source):
        parts = name.split(".")[1:]
        tails = (SOURCE.joinpath(*parts[:n]) for n in (len(parts), len(parts) - 1) if n >= 0)
        found = (file for tail in tails for file in (tail.with_suffix(".py"), tail / "__init__.py") if file.is_file())
        files |= set(list(found)[:1])
    return files - {path}


def circles(imports: dict[Path, set[Path]]) -> list[list[Path]]:
    """Chains of files each of which imports the next and the last the first; of circles that meet, one."""
    done: set[Path] = set()
    found = []

    def follow(chain: list[Path]) -> None:
        for file in sorted(imports.get(chain[-1], ())):
            if file in chain:
                found.append(chain[chain.index(file) :])
            elif file not in done:
                follow([*chain, file])
        done.add(chain[-1])

    for file in imports:
        if file not in done:
            follow([file])
    return found


def violations(path: Path, source: str) -> list[str]:
    own = unit_of(path)
    return [
        f"{path.relative_to(SOURCE)}:{line} ({own}) imports {unit}"
        for line, unit in imported_units(path, source)
        if unit != own and RANK[unit] >= RANK[own]
    ]


def test_every_module_has_a_rank() -> None:
    assert {unit_of(path) for path in MODULES} <= RANK.keys()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_down(path: Path) -> None:
    assert violations(path, path.read_text(encoding="utf-8")) == []


def test_no_circle_inside_a_package_either() -> None:
    """An import inside a function hides a circle from Python, not from a reader."""
    imports = {path: imported_modules(path, path.read_text(encoding="utf-8")) for path in MODULES}
    assert [[str(file.relative_to(SOURCE)) for file in circle] for circle in circles(imports)] == []


def test_circles_are_found() -> None:
    a, b, c = (SOURCE / "models" / f"{name}.py" for name in ("volo", "fuse", "segmenter"))
    inner = "def f():\n    from volo.models.{} import x"
    assert imported_modules(a, inner.format("fuse")) == imported_modules(a, "from volo.models import fuse") == {b}
    assert circles({a: {b}, b: {c}, c: {a}}) == [[a, b, c]]
    assert circles({a: {b, c}, b: {c}, c: set()}) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layers.py", "from volo.models.volo import VOLO"),
        ("layers.py", "import volo.data"),
        ("layers.py", "from volo import models"),
        ("models/volo.py", "def f():\n    from volo.tasks import classify"),
        ("data/images.py", "from ..models import volo"),
        ("ops/reference.py", "from .. import config"),
        ("training/loop.py", "from volo.explain.plots import curves"),
        ("models/volo.py", "from volo import create_model"),
        ("tasks/classify.py", "import importlib\nimportlib.import_module('volo.training.loop')"),
    ],
)
def test_the_walk_sees_imports_that_go_up(module: str, source: str) -> None:
    assert violations(SOURCE / module, source) != []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("layers.py", "import torch\nfrom volo.ops.outlook_attention import outlook_attention"),
        ("ops/outlook_attention.py", "from . import reference\nfrom volo.ops.reference import x"),
        ("training/optim.py", "from volo import __version__\nfrom volo.config import Recipe"),
        ("cli/main.py", "from volo.bench import ops"),
    ],
)
def test_the_walk_lets_imports_that_go_down_pass(module: str, source: str) -> None:
    assert violations(SOURCE / module, source) == []
