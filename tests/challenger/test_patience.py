"""Threads of an audit sleep while they wait, unless the user wants it otherwise."""

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
import challenger.cli
names = list(sys.modules)
assert names.index("challenger.patience") < names.index("torch"), "torch reads the environment once"
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
"""


@pytest.mark.parametrize(
    ("set_by_user", "told"),
    [
        ({}, "PASSIVE None"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "1000"}, "None 1000"),
    ],
)
def test_what_the_user_set_stands(set_by_user: dict[str, str], told: str) -> None:
    clean = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    command = [sys.executable, "-c", CODE]
    done = subprocess.run(command, env=clean | set_by_user, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == told
