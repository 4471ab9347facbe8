"""Python programs in processes of their own; tests/conftest.py sets up their environment."""

import os
import subprocess
import sys


def start(*command, cwd=None, **environment):
    """The process of a program, its path and its arguments, when it has ended."""
    command = [sys.executable, *map(str, command)]
    environment = {**os.environ, **{key: str(value) for key, value in environment.items()}}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def run(*command, **options):
    """What a program prints that ends without an error."""
    done = start(*command, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout
