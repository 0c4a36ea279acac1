"""Streaming a pack of a million rows: rows per second and what the memory takes, in a process of its own.

    python bench/packs.py

One file is a single row group, as writers make it unless they are told otherwise, the other has groups of 10,000 rows.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS = 1_000_000
GROUPS = {"one row group": ROWS, "groups of 10,000 rows": 10_000}


def write_pack(path: Path, rows_per_group: int) -> None:
    """Rows of 40 random words, some 320 bytes each."""
    random = np.random.default_rng(0)
    words = np.array([bytes(random.integers(97, 123, 7, np.uint8)).decode() for _ in range(5000)])
    chunks = [[" ".join(row) for row in words[random.integers(0, 5000, (10_000, 40))]] for _ in range(ROWS // 10_000)]
    pq.write_table(pa.table({"text": pa.chunked_array(chunks)}), path, row_group_size=rows_per_group)


def stream(folder: str) -> dict:
    """Read every row of the folder's pack. Peak memory is counted beyond what a pack of one row has taken before."""
    from eaftlib.text.packs import PackSource

    with tempfile.TemporaryDirectory() as other:
        pq.write_table(pa.table({"text": ["one row"]}), Path(other) / "pack.parquet")
        list(PackSource(other).rows("pack"))
    before = peak_mb()
    started = time.perf_counter()
    rows = sum(1 for _ in PackSource(folder).rows("pack"))
    seconds = time.perf_counter() - started
    return {"rows": rows, "seconds": seconds, "peak_mb": peak_mb() - before}


def peak_mb() -> float:
    """Peak resident memory of this program; getrusage would count what its parent held when it started it."""
    (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) / 1024


def main() -> None:
    for name, rows_per_group in GROUPS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pack.parquet"
            write_pack(path, rows_per_group)
            child = subprocess.run([sys.executable, __file__, folder], capture_output=True, text=True, check=True)
            found = json.loads(child.stdout)
            megabytes = path.stat().st_size / 1e6
        rate = found["rows"] / found["seconds"]
        print(f"{name:<24}{megabytes:>6,.0f} MB file{rate:>12,.0f} rows/s{found['peak_mb']:>8,.0f} MB beyond imports")


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(stream(sys.argv[1])))
    else:
        main()
