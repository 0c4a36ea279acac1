"""python -m eaftlib: what is useful outside a notebook."""

import argparse
import json
import sys
from pathlib import Path

from .errors import EaftError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eaftlib", description=__doc__)
    commands = parser.add_subparsers(required=True)
    summary = commands.add_parser("summary", help="print a report's verdicts: criteria by keep counts")
    summary.add_argument("verdict", type=Path, help="verdict.json of a report")
    summary.set_defaults(run=_summary)
    notebooks = commands.add_parser("notebooks", help="generate every .ipynb from its percent script")
    notebooks.add_argument("--check", action="store_true", help="write nothing; fail if one differs from its source")
    notebooks.set_defaults(run=_notebooks)
    options = parser.parse_args(arguments)
    try:
        return options.run(options)
    except (EaftError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _summary(options) -> int:
    from .report import summary

    print(summary(json.loads(options.verdict.read_text())))
    return 0


def _notebooks(options) -> int:
    from . import notebooks

    sources = notebooks.stale() if options.check else notebooks.regenerate()
    for source in sources:
        print(
            f"{source.with_suffix('.ipynb')} "
            + ("differs from its source; run make notebooks" if options.check else "written")
        )
    return int(options.check and bool(sources))


if __name__ == "__main__":
    sys.exit(main())
