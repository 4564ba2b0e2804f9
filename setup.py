"""Keeps ``python setup.py install`` and ``python setup.py test`` working; see pyproject.toml.

Setuptools has given up both: its ``install`` leaves the dependencies out, ``test`` is gone.
"""

import subprocess
import sys

from setuptools import setup

PIP = [sys.executable, "-m", "pip", "install", "--constraint", "constraints.txt"]

if sys.argv[1:] == ["install"]:
    sys.exit(subprocess.call([*PIP, "."]))
if sys.argv[1:] == ["test"]:
    sys.exit(
        subprocess.call([*PIP, "--editable", ".[test]", "--editable", "demo"])
        or subprocess.call([sys.executable, "-m", "pytest"])
    )
setup()
