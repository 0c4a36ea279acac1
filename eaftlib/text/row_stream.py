"""The rows of one pack file, streamed by ``datasets``. Imported where rows are read: ``datasets`` takes a second to load."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Value
from datasets.data_files import DataFilesDict, DataFilesList
from datasets.packaged_modules.parquet.parquet import Parquet

ROWS_PER_READ = 32  # a conversation may be a megabyte long
_READ_AHEAD = 1 << 20  # bytes of the file


class BoundedParquet(Parquet):
    """The parquet builder of ``datasets``, which decodes a whole row group at once, made to decode batch by batch.

    A writer's default is a row group of a million rows, so that the builder's own ``batch_size`` bounds what it yields
    but not what it holds. Checksums of pages are verified where the writer left some.
    """

    def _generate_tables(self, **_) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        """Of the files in the configuration: those that are given come in other nestings from release to release."""
        settings = {"buffer_size": _READ_AHEAD, "pre_buffer": False, "page_checksum_verification": True}
        for number, file in enumerate(self.config.data_files["train"]):
            with pq.ParquetFile(file, **settings) as opened:
                # Threads decode columns side by side; there is one.
                batches = opened.iter_batches(self.config.batch_size, columns=self.config.columns, use_threads=False)
                for i, batch in enumerate(batches):
                    yield (number, i), self._cast_table(pa.Table.from_batches([batch]))


def stream_text(path: Path) -> Iterator[str | None]:
    """Column ``text`` of a local parquet file in order, ``ROWS_PER_READ`` rows in memory at a time."""
    # A DataFilesDict is taken as it is; in a plain path, brackets would be a pattern.
    files = DataFilesDict({"train": DataFilesList([str(path)], [()])})
    text = Features({"text": Value("large_string")})
    with tempfile.TemporaryDirectory() as cache:  # the builder locks its cache; nothing is ever put there
        builder = BoundedParquet(cache, data_files=files, columns=["text"], features=text, batch_size=ROWS_PER_READ)
        dataset = builder.as_streaming_dataset("train")
    for table in dataset.with_format("arrow").iter(ROWS_PER_READ):
        yield from table["text"].to_pylist()
