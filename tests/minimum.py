"""Prints the requirements of an environment with the lowest versions that pyproject.toml allows: `make test-minimum`."""

import tomllib
from itertools import chain
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOOLS = ("pytest", "hypothesis", "accelerate", "import-linter")


def lowest() -> list[str]:
    """What is declared, each lower bound as the one version; and tools of tests, as requirements.txt has them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"].values())]
    pinned = (ROOT / "requirements.txt").read_text().splitlines()
    tools = [line for line in pinned if line.split("==")[0] in TOOLS]
    return [line if "setuptools" in line else line.replace(">=", "==") for line in declared] + tools


if __name__ == "__main__":
    print("\n".join(lowest()))
