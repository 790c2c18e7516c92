"""pyright on the package, on a user's script and on a script of mistakes: `pyproject.toml` says which."""

import pathlib
import subprocess
import sys


def test_an_editor_sees_what_is_right_and_what_is_wrong():
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
