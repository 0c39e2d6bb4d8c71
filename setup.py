"""What pyproject.toml cannot say.

`recipes/` at the root of the checkout becomes `volo/recipes` inside a wheel, and the CPU kernel of `csrc/` is compiled
where there is a compiler. The kernel is a shared library with a plain C interface, no Python module: its name carries
no Python version and one wheel serves them all.
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return  # `volo.config.list_recipes` reads the checkout's own
        folder = Path(self.build_lib) / "volo" / "recipes"
        folder.mkdir(parents=True, exist_ok=True)
        for recipe in sorted(Path("recipes").glob("*.toml")):
            self.copy_file(str(recipe), str(folder / recipe.name))


# Each instruction set is a source of its own, compiled for it; the library chooses among them when it runs.
INSTRUCTION_SETS = {
    "outlook_portable.cpp": [],
    "outlook_avx2.cpp": ["-mavx2", "-mfma"],
    "outlook_avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
}

KERNEL = Extension(
    "volo.ops._outlook_attention",
    sources=[f"csrc/{name}" for name in INSTRUCTION_SETS],
    depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
    language="c++",
    extra_compile_args=["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi", "-g0"],
    extra_link_args=["-fopenmp"],
    optional=True,  # without a compiler the reference engine serves, and says so
)


class BuildKernel(build_ext):
    def get_ext_filename(self, ext_name: str) -> str:
        return str(Path(*ext_name.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        compile_one = self.compiler.compile
        is_x86 = platform.machine().lower() in ("x86_64", "amd64")

        def compile_each(sources: list[str], **options: object) -> list[str]:
            objects = []
            for source in sources:
                flags = INSTRUCTION_SETS[Path(source).name] if is_x86 else []
                own = {**options, "extra_postargs": [*options["extra_postargs"], *flags]}
                objects += compile_one([source], **own)
            return objects

        self.compiler.compile = compile_each
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = compile_one


class WheelForEveryPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[KERNEL],
    cmdclass={"build_py": BuildWithRecipes, "build_ext": BuildKernel, "bdist_wheel": WheelForEveryPython},
)
