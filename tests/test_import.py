"""`import volo` and its models need torch and nothing else, so a broken extra never breaks them."""

from __future__ import annotations

import json
import subprocess
import sys

NEW_PACKAGES = """
import json, sys
import torch
before = set(sys.modules)
import volo
volo.create_model, volo.outlook_attention  # loaded when first asked for
new = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
print(json.dumps(sorted(name for name in new if not name.startswith("__editable__"))))
"""

HEAVY = ["timm", "torchvision", "triton", "PIL", "safetensors", "tyro", "rich", "matplotlib", "sklearn", "tensorboard"]

WITHOUT_EXTRAS = f"""
import sys
for name in {HEAVY}:
    sys.modules[name] = None  # makes `import name` fail
import torch, volo
model = volo.create_model("volo_nano")
assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_beyond_torch() -> None:
    assert json.loads(run(NEW_PACKAGES)) == ["volo"]


def test_heavy_packages_are_not_loaded() -> None:
    loaded = run(f"import sys, volo; volo.create_model; print([name for name in {HEAVY} if name in sys.modules])")
    assert loaded.strip() == "[]"


def test_the_bare_import_leaves_torch_alone() -> None:
    assert run("import sys, volo; print(volo.__version__, 'torch' in sys.modules)").split()[1] == "False"


def test_models_run_with_torch_alone() -> None:
    run(WITHOUT_EXTRAS)
