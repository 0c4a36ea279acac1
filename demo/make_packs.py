"""Make the demo's packs, its tokenizer and its training tokens; everything follows from the seed and the sources.

    python demo/make_packs.py --wordnet DIR                    packs and tokenizer
    python demo/make_packs.py --wordnet DIR --train OUT.npz    training tokens, with the committed packs and tokenizer
    python demo/make_packs.py --wordnet DIR --text FOLDER      packs of such rows, to recover on: give another --seed

Committed and training rows never share a first question (its hash decides who may use it), half of all dictionary and
docstring entries occur in committed rows only, and contradictions occur in committed rows only.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import reasoning_tasks
import text_tasks
import tool_tasks
from chat import Chat, can_contradict, contradict, plain
from sources import load_docstrings, load_wordnet, seen_in_training
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from eaftlib.text.harmony import completion_spans  # noqa: E402

PACKS = {"reasoning_style": reasoning_tasks.make, "tool_agentic": tool_tasks.make, "calib_prompt": text_tasks.make}
VOCAB_SIZE = 4096
SPECIALS = ("<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>",
            "<|message|>", "<|call|>")  # fmt: skip
HALF_TOKENS = 340_000  # tokens that each half of a pack must hold: 160 blocks of 2048 and some to spare
CONTRADICTED = 0.04  # share of committed rows that contradict themselves
HELD_OUT = 0.2  # share of first questions that only committed rows may ask
BATCH = 2000
TOKENIZER_ROWS = 20_000  # rows of each pack that the vocabulary is learned from


def is_held_out(question: str) -> bool:
    digest = hashlib.sha256(question.strip().lower().encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT * 2**32


def conversations(pack: str, texts: text_tasks.Texts, seed: int, held_out: bool):
    """Endless (marked text, generator) pairs of one pack, distinct within the call."""
    rng, known = Random(f"{seed} {pack} {held_out}"), set()
    while True:
        chat = PACKS[pack](rng, Chat(rng), texts)
        if is_held_out(chat.question) == held_out and chat.marked not in known:
            known.add(chat.marked)
            yield chat.marked, rng


def training_rows(pack: str, texts: text_tasks.Texts, seed: int):
    return (plain(marked) for marked, _ in conversations(pack, texts, seed, held_out=False))


def committed_rows(pack: str, texts: text_tasks.Texts, seed: int, tokenizer: Tokenizer) -> tuple[list[str], int]:
    """Rows until both halves hold ``HALF_TOKENS``, and how many of them are contradicted."""
    rows, tokens, contradicted = [], {True: 0, False: 0}, 0
    for marked, rng in conversations(pack, texts, seed, held_out=True):
        wrong = rng.random() < CONTRADICTED and can_contradict(marked)
        row = contradict(marked, rng) if wrong else plain(marked)
        tokens[is_calib(row)] += len(tokenizer.encode(row, add_special_tokens=False).ids) + 1
        contradicted += wrong
        rows.append(row)
        if min(tokens.values()) >= HALF_TOKENS:
            return rows, contradicted


def is_calib(row: str) -> bool:
    return hashlib.sha256(row.encode()).digest()[0] >= 128


def train_tokenizer(rows) -> Tokenizer:
    """Byte-level BPE with single digits; the Harmony tags take the last places of the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r"[0-9]| ?[A-Za-z_]+|\s*\n| ?[^\sA-Za-z0-9_]+|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(rows, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS), show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    ))  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(tag, special=True, normalized=False) for tag in SPECIALS])
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(
            f"the vocabulary holds {tokenizer.get_vocab_size()} tokens, not {VOCAB_SIZE}: more text is needed"
        )
    return tokenizer


def without_tags(row: str) -> str:
    for tag in SPECIALS:
        row = row.replace(tag, "\n")
    return row


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """With gpt-oss's roles: bos <|startoftext|>, eos <|return|>, pad <|endoftext|>."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|startoftext|>", eos_token="<|return|>", pad_token="<|endoftext|>",
        model_max_length=4096, model_input_names=["input_ids", "attention_mask"],
        chat_template=(folder / "chat_template.jinja").read_text(),
    )  # fmt: skip
    fast.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    settings = json.loads(config.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # known to all releases
    config.write_text(json.dumps(settings, indent=2) + "\n")
    roles = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token")}
    (folder / "special_tokens_map.json").write_text(json.dumps(roles, indent=2) + "\n")


def encode_kept(tokenizer: Tokenizer, rows: list[str]):
    """Token IDs and kept flags of each row; a kept token's characters overlap an assistant's message content."""
    for row, encoding in zip(rows, tokenizer.encode_batch(rows, add_special_tokens=False), strict=True):
        starts, ends = np.array(encoding.offsets, dtype=np.int64).T
        kept = np.zeros(len(starts), dtype=bool)
        for start, end in completion_spans(row):
            kept |= (starts < end) & (ends > start)
        yield np.array(encoding.ids, dtype=np.uint16), kept


def write_training(out: Path, tokenizer: Tokenizer, texts, seed: int, total_tokens: int) -> None:
    """Write ``tokens`` (uint16) and ``kept`` (np.packbits of one flag a token); each row ends in one EOS, not kept."""
    forbidden = {row for pack in PACKS for row in read_pack(pack)}
    eos = np.array([tokenizer.token_to_id("<|return|>")], dtype=np.uint16)
    rows, flags = [], []
    for pack in PACKS:
        source, tokens, scored = training_rows(pack, texts, seed), 0, 0
        while tokens < total_tokens / len(PACKS):
            batch = [row for row, _ in zip(source, range(BATCH), strict=False) if row not in forbidden]
            for ids, kept in encode_kept(tokenizer, batch):
                rows.append(np.concatenate([ids, eos]))
                flags.append(np.append(kept, False))
                tokens, scored = tokens + len(ids) + 1, scored + int(kept.sum())
        print(f"{pack:16} {len(rows):8,} rows so far, {tokens:11,} tokens, kept {scored / tokens:.3f}", flush=True)
    order = np.random.default_rng(seed).permutation(len(rows))
    tokens = np.concatenate([rows[i] for i in order])
    kept = np.concatenate([flags[i] for i in order])
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, tokens=tokens, kept=np.packbits(kept))
    print(f"{out}: {len(order):,} rows, {len(tokens):,} tokens, kept {kept.mean():.3f}, {out.stat().st_size:,} bytes")


def write_text(folder: Path, tokenizer: Tokenizer, texts, seed: int, total_tokens: int) -> None:
    """Packs whose rows may be trained on, each with a third of the tokens."""
    forbidden = {row for pack in PACKS for row in read_pack(pack)}
    folder.mkdir(parents=True, exist_ok=True)
    for pack in PACKS:
        source, rows, tokens = training_rows(pack, texts, seed), [], 0
        while tokens < total_tokens / len(PACKS):
            batch = [row for row, _ in zip(source, range(BATCH), strict=False) if row not in forbidden]
            tokens += sum(len(e.ids) + 1 for e in tokenizer.encode_batch(batch, add_special_tokens=False))
            rows += batch
        pq.write_table(pa.table({"text": rows}), folder / f"{pack}.parquet", compression="zstd")
        print(f"{pack:16} {len(rows):8,} rows, {tokens:11,} tokens", flush=True)


def pack_path(pack: str) -> Path:
    return HERE / "packs" / f"{pack}.parquet"


def read_pack(pack: str) -> list[str]:
    return pq.read_table(pack_path(pack)).column("text").to_pylist()


def write_packs(tokenizer: Tokenizer, texts, seed: int) -> None:
    print(f"{'pack':16} {'half':6} {'rows':>6} {'tokens':>9} {'kept':>6}")
    for pack in PACKS:
        rows, contradicted = committed_rows(pack, texts, seed, tokenizer)
        pq.write_table(pa.table({"text": rows}), pack_path(pack), compression="zstd", compression_level=19,
                       use_dictionary=False, row_group_size=len(rows), write_page_index=False,
                       data_page_size=1 << 26)  # fmt: skip
        encoded = list(encode_kept(tokenizer, rows))
        for half, chosen in (("calib", True), ("eval", False)):
            part = [e for row, e in zip(rows, encoded, strict=True) if is_calib(row) == chosen]
            tokens, kept = sum(len(ids) + 1 for ids, _ in part), sum(int(k.sum()) for _, k in part)
            print(f"{pack:16} {half:6} {len(part):6,} {tokens:9,} {kept / tokens:6.3f}")
        print(
            f"{'':16} {pack_path(pack).stat().st_size:,} bytes, {contradicted / len(rows):.3f} of rows contradicted",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with WordNet's data.noun, index.noun, ...")
    parser.add_argument("--train", type=Path, help="write training tokens to this .npz instead of the packs")
    parser.add_argument("--text", type=Path, help="write rows like those of training to packs in this folder")
    parser.add_argument("--train-tokens", type=int, default=27_000_000)
    parser.add_argument("--seed", type=int, default=20260)
    args = parser.parse_args()
    entries, functions = load_wordnet(args.wordnet), load_docstrings()
    seen = text_tasks.Texts([e for e in entries if seen_in_training(e.word)],
                            [f for f in functions if seen_in_training(f.name)])  # fmt: skip
    model = HERE / "model"
    if args.train or args.text:
        tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        write = write_training if args.train else write_text
        return write(args.train or args.text, tokenizer, seen, args.seed, args.train_tokens)
    sample = (without_tags(row) for pack in PACKS
              for row, _ in zip(training_rows(pack, seen, args.seed), range(TOKENIZER_ROWS), strict=False))  # fmt: skip
    save_tokenizer(train_tokenizer(sample), model)
    write_packs(Tokenizer.from_file(str(model / "tokenizer.json")), text_tasks.Texts(entries, functions), args.seed)


if __name__ == "__main__":
    main()
