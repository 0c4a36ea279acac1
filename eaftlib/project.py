"""Where a notebook runs: the repository's root, and the versions that made its numbers."""

import hashlib
import os
import subprocess
from pathlib import Path


def enter() -> Path:
    """Change to the repository's root if the working directory lies inside it, so that paths mean the same everywhere.

    Elsewhere (a Kaggle session, say) the directory stays. Prints the versions and the commit; returns the directory.
    """
    import torch
    import transformers

    from . import __version__

    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "notebooks").is_dir() and (p / "params").is_dir()), here)
    os.chdir(root)
    print(f"eaftlib {__version__} ({commit(root)}), torch {torch.__version__}, transformers {transformers.__version__}")
    return root


def code_sha256(package: Path = Path(__file__).parent) -> str:
    """Identifies the library's code, wherever it is installed: over the path and the bytes of every source file."""
    files = {f.relative_to(package): f for f in package.rglob("*") if f.suffix in (".py", ".jinja")}
    digest = hashlib.sha256()
    for name in sorted(files):
        if not any(part.startswith(".") for part in name.parts):  # an editor's copies
            content = files[name].read_bytes()
            digest.update(f"{name.as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def commit(root: Path) -> str:
    """Short id of the checked-out commit, with a plus if files differ from it."""
    if not (root / ".git").exists():
        return "no git checkout"
    described = subprocess.run(
        ["git", "-C", root, "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False
    )
    return described.stdout.strip() or "no commit"
