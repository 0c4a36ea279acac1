"""Rows, their order and split, and packing, against plain loops over characters and tokens."""

import collections
import hashlib
import itertools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import world
from hypothesis import assume, given
from hypothesis import strategies as st
from test_harmony import rows as harmony_rows
from test_harmony import spans_by_regex
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eaftlib.errors import PackError
from eaftlib.text.harmony import completion_spans
from eaftlib.text.packs import PackSource, overlaps, pack_blocks


@pytest.fixture(scope="module")
def straddling_tokenizer():
    """Knows no special token and merges over any boundary: its tokens run across Harmony's tags into the content."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["EOS"], initial_alphabet=alphabet, show_progress=False
    )
    texts = [f"<|start|>assistant<|message|>text{i % 7}<|end|>ü🙂 <|start|>assistant to=f" for i in range(60)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="EOS")


def stream(rows, tokenizer):
    """(token, kept) of all rows one after another, each closed by EOS, with kept decided character by character."""
    tokens = []
    for text in rows:
        scored = [False] * len(text)
        for start, end in spans_by_regex(text):
            scored[start:end] = [True] * (end - start)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            tokens.append((token, any(scored[start:end])))
        tokens.append((tokenizer.eos_token_id, False))
    return tokens


def stub(rows):
    return SimpleNamespace(source="rows in memory", parts=lambda pack, split: {pack: iter(rows)})


def check_packing(rows, tokenizer, seq_len):
    rows = [r for r in rows if r.strip()]
    expected = stream(rows, tokenizer)
    num_blocks = len(expected) // seq_len
    scored = [kept and i % seq_len > 0 for i, (_, kept) in enumerate(expected)][: num_blocks * seq_len]
    assume(any(scored))
    blocks = pack_blocks(stub(rows), "p", tokenizer, completion_spans, seq_len=seq_len, num_blocks=num_blocks)
    assert blocks.tokens.shape == blocks.kept.shape == (num_blocks, seq_len)
    assert blocks.tokens.ravel().tolist() == [token for token, _ in expected[: num_blocks * seq_len]]
    assert blocks.kept.ravel().tolist() == scored


@given(st.lists(harmony_rows, min_size=1, max_size=6), st.integers(2, 40))
def test_blocks_are_the_token_stream_and_kept_is_decided_per_character(tokenizer, rows, seq_len):
    check_packing([world.conversation(len(rows)), *rows], tokenizer, seq_len)


@given(st.lists(harmony_rows, min_size=1, max_size=6), st.integers(2, 40))
def test_packing_with_tokens_that_straddle_tags(straddling_tokenizer, rows, seq_len):
    check_packing(["<|start|>assistant<|message|>text1<|end|>", *rows], straddling_tokenizer, seq_len)


def test_a_token_that_straddles_the_tag_is_kept(straddling_tokenizer):
    text = "<|start|>assistant<|message|>text1<|end|>"
    offsets = straddling_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    (span,) = spans_by_regex(text)
    straddling = [i for i, (a, b) in enumerate(offsets) if a < span[0] < b or a < span[1] < b]
    assert straddling, "the fixture should straddle"
    assert overlaps(np.array(offsets), [span])[straddling].all()


offset_lists = st.lists(
    st.tuples(st.integers(0, 30), st.integers(0, 4)).map(lambda t: (t[0], t[0] + t[1])), max_size=20
)


@given(offset_lists, st.sets(st.integers(0, 34)))
def test_overlap_is_sharing_a_character(offsets, scored):
    edges = [c for c in sorted(scored) if c - 1 not in scored]
    spans = [(a, next(b for b in range(a, 99) if b not in scored)) for a in edges]
    found = overlaps(np.array(offsets, dtype=np.int64).reshape(-1, 2), spans)
    assert found.tolist() == [any(c in scored for c in range(a, b)) for a, b in offsets]


def test_hand_packed_blocks(tokenizer):
    """Two short rows, written out token by token."""
    first, second = "<|start|>assistant<|message|>ab<|end|>", "<|start|>user<|message|>c<|end|>"
    eos = tokenizer.eos_token_id
    ids = [tokenizer.convert_tokens_to_ids(t) for t in ("<|start|>", "<|message|>", "<|end|>")]
    start, message, end = ids
    letters = {c: tokenizer.convert_tokens_to_ids(c) for c in "abcsistantuer"}
    word = tokenizer("assistant")["input_ids"]
    expected = [start, *word, message, letters["a"], letters["b"], end, eos]
    head = len(word) + 2
    blocks = pack_blocks(
        stub([first, second]), "p", tokenizer, completion_spans, seq_len=len(expected) + 1, num_blocks=1
    )
    assert blocks.tokens[0].tolist() == [*expected, start]
    assert np.flatnonzero(blocks.kept[0]).tolist() == [head, head + 1]
    assert blocks.rows_seen == 2


def test_rows_seen_and_hash_cover_exactly_the_rows_that_were_cut(source, tokenizer):
    blocks = pack_blocks(source, "pack_a", tokenizer, completion_spans, seq_len=32, num_blocks=6)
    rows = [world.conversation(i) for i in range(20)]
    needed = next(n for n in range(1, 21) if len(stream(rows[:n], tokenizer)) >= 32 * 6)
    assert 1 < needed < 20
    assert blocks.rows_seen == needed
    assert blocks.rows_sha256 == hashlib.sha256(b"".join(r.encode() + b"\0" for r in rows[:needed])).hexdigest()


def test_first_blocks_do_not_depend_on_how_many_follow(source, tokenizer):
    few = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=24, num_blocks=3)
    many = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=24, num_blocks=9)
    assert np.array_equal(few.tokens, many.tokens[:3]) and np.array_equal(few.kept, many.kept[:3])


def write_three(folder):
    world.write_pack(folder / "x.parquet", ["x0", "x1", None, "x3"])
    world.write_pack(folder / "y.parquet", ["y0", ""])
    world.write_pack(folder / "z.parquet", [None, "z1", "z2", "z3", "z4"])
    return folder


def test_union_takes_turns_and_skips_finished_packs_and_bad_rows(tmp_path):
    source = PackSource(str(write_three(tmp_path)))
    assert source.names == ["x", "y", "z", "UNION"]
    assert list(source.rows("UNION")) == ["x0", "y0", "x1", "z1", "z2", "x3", "z3", "z4"]


def test_union_follows_the_listed_order(tmp_path):
    write_three(tmp_path)
    source = PackSource(str(tmp_path), ["z.parquet", "x.parquet"])
    assert list(source.rows("UNION")) == ["x0", "z1", "x1", "z2", "z3", "x3", "z4"]


def test_union_of_packs_longer_than_one_read(tmp_path):
    long, short = [f"long {i}" for i in range(700)], [f"short {i}" for i in range(300)]
    world.write_pack(tmp_path / "a.parquet", long)
    world.write_pack(tmp_path / "b.parquet", short)
    expected = [row for pair in zip(long, short, strict=False) for row in pair] + long[300:]
    assert list(PackSource(str(tmp_path)).rows("UNION")) == expected


PARTS = {
    "a": [world.conversation(i) for i in range(90)],
    "b": [None, "", world.conversation(100), None, world.conversation(101)],  # finished early
    "c": [None if i % 7 == 3 else "" if i % 11 == 5 else world.conversation(200 + i) for i in range(70)],
}


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """Files of one row group, of groups smaller than a read, and of one that ends within a group."""
    folder = tmp_path_factory.mktemp("grouped")
    for (name, rows), text, size in zip(PARTS.items(), ("string", "large_string", "string"), (90, 2, 13), strict=True):
        table = pa.table({"id": range(len(rows)), "text": pa.array(rows, pa.type_for_alias(text))})
        pq.write_table(table, folder / f"{name}.parquet", row_group_size=size)
    return folder


def plain_union(folder):
    columns = [pq.read_table(folder / f"{name}.parquet")["text"].to_pylist() for name in "abc"]
    longest = max(map(len, columns))
    return [column[i] for i in range(longest) for column in columns if i < len(column) and column[i]]


@pytest.fixture
def rows_decoded(monkeypatch):
    """How many rows were taken from the parquet file of so many rows."""
    decoded = collections.Counter()
    iter_batches = pq.ParquetFile.iter_batches

    def counting(file, *args, **settings):
        for batch in iter_batches(file, *args, **settings):
            decoded[file.metadata.num_rows] += len(batch)
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counting)
    return decoded


def test_rows_are_those_of_a_plain_reading(grouped, rows_decoded):
    source = PackSource(str(grouped))
    for name, rows in PARTS.items():
        assert list(source.rows(name)) == [row for row in rows if row]
    assert rows_decoded == {90: 90, 5: 5, 70: 70}
    assert list(source.rows("UNION")) == plain_union(grouped)


def test_blocks_of_grouped_files_are_cut_from_a_plain_reading(grouped, tokenizer, rows_decoded):
    rows = plain_union(grouped)
    expected = stream(rows, tokenizer)
    blocks = pack_blocks(
        PackSource(str(grouped)), "UNION", tokenizer, completion_spans, seq_len=64, num_blocks=len(expected) // 64
    )
    assert blocks.tokens.ravel().tolist() == [token for token, _ in expected[: blocks.tokens.size]]
    seen = b"".join(row.encode() + b"\0" for row in rows[: blocks.rows_seen])
    whose = [i for i, row in enumerate(rows) for _ in stream([row], tokenizer)]
    assert blocks.row.dtype == np.int32 and blocks.row.ravel().tolist() == whose[: blocks.tokens.size]
    assert blocks.rows_seen >= len(rows) - 1 and blocks.rows_sha256 == hashlib.sha256(seen).hexdigest()
    assert rows_decoded == {90: 90, 5: 5, 70: 70}


def test_a_pack_of_one_row_group_is_not_held_whole(tmp_path):
    world.write_pack(tmp_path / "p.parquet", [f"{i} {i * 7919} " * 200 for i in range(20_000)])
    size = pq.read_metadata(tmp_path / "p.parquet").row_group(0).column(0).total_uncompressed_size
    rows = PackSource(str(tmp_path)).rows("p")
    before = pa.total_allocated_bytes()
    held = [pa.total_allocated_bytes() - before for _ in itertools.islice(rows, 200)]
    assert max(held) < 8e6 < size / 4


def test_few_characters_are_tokenised_at_once_and_little_past_the_blocks(tokenizer):
    """Forty rows of 100,000 characters, of which the blocks take two."""
    row = "<|start|>assistant<|message|>" + "a" * 100_000 + "<|end|>"
    batches = []

    def counting(texts, **settings):
        batches.append(sum(map(len, texts)))
        return tokenizer(texts, **settings)

    counting.eos_token_id = tokenizer.eos_token_id
    needed = len(stream([row], tokenizer)) + 10
    pack_blocks(stub([row] * 40), "p", counting, completion_spans, seq_len=needed, num_blocks=1)
    assert len(batches) == 1 and batches[0] < 4 * len(row)


def test_a_pack_that_shows_no_span_yet_is_read_on_to_its_first(tmp_path, tokenizer, rows_decoded):
    mute = "<|start|>user<|message|>hi<|end|>"
    world.write_pack(tmp_path / "a.parquet", [world.conversation(i) for i in range(1000)])
    world.write_pack(tmp_path / "b.parquet", [mute] * 600 + [world.conversation(0)] + [mute] * 400)
    source = PackSource(str(tmp_path))
    blocks = pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=200, num_blocks=2)
    assert blocks.rows_seen < 10
    assert rows_decoded[1000] <= 512 and 600 < rows_decoded[1001] < 700


def test_a_pack_of_a_union_without_a_span_is_named_and_read_once(tmp_path, tokenizer, rows_decoded):
    world.write_pack(tmp_path / "a.parquet", [world.conversation(i) for i in range(1000)])
    world.write_pack(tmp_path / "b.parquet", ["<|start|>user<|message|>hi<|end|>"] * 500)
    source = PackSource(str(tmp_path))
    with pytest.raises(PackError, match=r"pack b \(rows: all\) of .* no row has an assistant message"):
        pack_blocks(source, "UNION", tokenizer, completion_spans, seq_len=16, num_blocks=2)
    assert 0 < rows_decoded[1000] <= 512 and rows_decoded[500] == 500


def test_brackets_in_a_path_are_no_pattern(tmp_path):
    world.write_pack(tmp_path / "packs [1]*" / "p.parquet", ["a"])
    assert list(PackSource(str(tmp_path / "packs [1]*")).rows("p")) == ["a"]


def test_packs_in_subfolders_are_named_by_their_stem(tmp_path):
    world.write_pack(tmp_path / "packs" / "deep" / "deep_v2.parquet", ["d"])
    source = PackSource(str(tmp_path), ["packs/deep/deep_v2.parquet"])
    assert source.names == ["deep_v2", "UNION"] and list(source.rows("deep_v2")) == ["d"]


def test_calib_and_eval_split_by_the_first_byte_of_sha256(tmp_path):
    rows = [f"row {i}" for i in range(400)]
    world.write_pack(tmp_path / "p.parquet", rows)
    source = PackSource(str(tmp_path))
    calib, held_out = (list(source.rows("p", split)) for split in ("calib", "eval"))
    assert calib == [r for r in rows if int(hashlib.sha256(r.encode()).hexdigest()[:2], 16) >= 128]
    assert held_out == [r for r in rows if int(hashlib.sha256(r.encode()).hexdigest()[:2], 16) < 128]
    assert 150 < len(calib) < 250 and len(calib) + len(held_out) == 400


def test_large_string_columns_are_read(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a", "b"], pa.large_string())}), tmp_path / "p.parquet")
    assert list(PackSource(str(tmp_path)).rows("p")) == ["a", "b"]


def test_kaggle_mount_is_found_by_owner_and_slug(tmp_path, monkeypatch):
    from eaftlib.text import packs

    monkeypatch.setattr(packs, "KAGGLE_INPUT", tmp_path)
    world.write_pack(tmp_path / "my-packs" / "p.parquet", ["mounted"])
    assert list(PackSource("someone/my-packs").rows("p")) == ["mounted"]


@pytest.mark.parametrize(
    "column, rows, words",
    [("content", ["a"], ["p.parquet", "'text'", "content"]), ("text", [1, 2], ["p.parquet", "string", "int64"])],
)
def test_a_pack_without_a_string_column_text_is_refused(tmp_path, column, rows, words):
    pq.write_table(pa.table({column: rows}), tmp_path / "p.parquet")
    with pytest.raises(PackError) as error:
        PackSource(str(tmp_path))
    assert all(word in str(error.value) for word in words)


def test_bad_sources_are_named(tmp_path):
    with pytest.raises(PackError, match="no parquet file"):
        PackSource(str(tmp_path))
    world.write_pack(tmp_path / "p.parquet", ["a"])
    with pytest.raises(PackError, match=r"no file 'q.parquet'; it has \['p.parquet'\]"):
        PackSource(str(tmp_path), ["q.parquet"])
    with pytest.raises(PackError, match="neither a folder nor"):
        PackSource("/no/such/folder")
    with pytest.raises(PackError, match="'nobody/no-such-packs' is no local folder and could not be fetched"):
        PackSource("nobody/no-such-packs", ["p.parquet"])


def test_a_damaged_parquet_file_is_named(tmp_path):
    whole = world.write_pack(tmp_path / "p.parquet", ["a" * 99] * 99).read_bytes()
    (tmp_path / "p.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackError, match=r"p\.parquet is not a readable parquet file"):
        PackSource(str(tmp_path))


def test_two_packs_of_one_name_are_refused(tmp_path):
    for folder in "ab":
        world.write_pack(tmp_path / folder / "p.parquet", ["x"])
    with pytest.raises(PackError, match="share a name"):
        PackSource(str(tmp_path))


def test_unknown_pack_and_split_are_refused(source):
    with pytest.raises(PackError, match=r"'pack_q' is not in .*pack_a.*UNION"):
        list(source.rows("pack_q"))
    with pytest.raises(PackError, match="found 'test'"):
        list(source.rows("pack_a", "test"))


def test_too_few_rows_say_how_many_blocks_they_fill(source, tokenizer):
    rows = [world.conversation(200 + i) for i in range(8)]
    filled = len(stream(rows, tokenizer)) // 32
    with pytest.raises(PackError, match=rf"pack pack_c .* fills {filled} blocks of 32 tokens from 8 rows; 500 were"):
        pack_blocks(source, "pack_c", tokenizer, completion_spans, seq_len=32, num_blocks=500)


def test_a_pack_without_assistant_messages_is_refused(tokenizer):
    with pytest.raises(PackError, match="no row has an assistant message"):
        pack_blocks(
            stub(["<|start|>user<|message|>" + "hi " * 50 + "<|end|>"]),
            "p",
            tokenizer,
            completion_spans,
            seq_len=8,
            num_blocks=2,
        )
