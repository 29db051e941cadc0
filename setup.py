"""Everything about the package is in pyproject.toml, but one thing: configs/ stands beside the
package in a checkout, for people to find, and goes inside it in a wheel, for the package to find.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    def run(self):
        super().run()
        if not self.editable_mode:  # then the checkout's own are found
            for source, target in self._configs().items():
                self.mkpath(str(Path(target).parent))
                self.copy_file(source, target)

    def get_outputs(self, include_bytecode=True):
        more = [] if self.editable_mode else list(self._configs().values())
        return super().get_outputs(include_bytecode) + more

    def _configs(self):
        target = Path(self.build_lib, "moe_router", "configs")
        return {str(path): str(target / path.name) for path in Path("configs").glob("*.yaml")}


setup(cmdclass={"build_py": BuildWithConfigs})
