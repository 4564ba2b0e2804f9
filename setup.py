"""Keeps ``python setup.py install`` and ``python setup.py test`` working; pyproject.toml is the truth."""

import subprocess
import sys

from setuptools import Command, setup


class Test(Command):
    description = "run the test suite with pytest"
    user_options = []  # noqa: RUF012 - the attribute that setuptools reads

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        sys.exit(subprocess.call([sys.executable, "-m", "pytest"]))


setup(cmdclass={"test": Test})
