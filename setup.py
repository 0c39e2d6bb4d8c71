"""What pyproject.toml cannot say: `recipes/` at the root of the checkout becomes `volo/recipes` inside a wheel."""

from pathlib import Path

from setuptools import setup
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


setup(cmdclass={"build_py": BuildWithRecipes})
