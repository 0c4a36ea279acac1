"""The library's rooms: what imports what, and what a light module does not load."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIGHT = ["params", "pruning.criteria", "pruning.keepsets", "pruning.explore", "evaluation.results", "report.model"]


def test_rooms_import_downwards_and_in_no_circle():
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_load_neither_torch_nor_transformers(module):
    program = f"import sys, eaftlib.{module}; print(*{{'torch', 'transformers', 'matplotlib'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
