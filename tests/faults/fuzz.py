"""Coverage-guided fuzzing of what reads foreign text, with an oracle for each: whatever is accepted must be right.

    pip install atheris
    python tests/faults/fuzz.py spans|result|ranking SECONDS

Inputs that reached new code are kept in ``corpus/<target>``; ``tests/test_fuzz.py`` replays them. An input that breaks a
target is left in ``outputs/fuzz`` and ends the run.
"""

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent), str(HERE)]
LONGEST = 512  # bytes of an input


def main(target: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(include=["eaftlib"]):
        import targets

        check = targets.TARGETS[target]()  # imports what it needs
    corpus, found = HERE / "corpus" / target, HERE.parents[1] / "outputs/fuzz"
    for folder in (corpus, found):
        folder.mkdir(parents=True, exist_ok=True)
    limits = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=4096"]
    atheris.Setup([sys.argv[0], str(corpus), f"-artifact_prefix={found}/{target}-", *limits], check)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
