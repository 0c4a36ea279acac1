"""Damaged checkpoints: each is refused by the library's own error, or gives what the undamaged one gives.

``python tests/faults/checkpoint.py`` counts, kind by kind, what became of every case.
"""

import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
HUGE = 10**30
DELETED = object()


def copy(model: Path, folder: Path) -> Path:
    """The checkpoint again; files are shared until ``write`` puts another in their place."""
    return Path(shutil.copytree(model, folder, copy_function=os.link))


def write(path: Path, content: bytes | str) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    write(path, json.dumps(content))


def instead(make: Callable[[Path], object], name: str, folder: Path) -> None:
    (folder / name).unlink()
    make(folder / name)


def shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def header(path: Path) -> tuple[dict, bytes]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_header(path: Path, entries: dict | bytes, data: bytes) -> None:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    write(path, len(text).to_bytes(8, "little") + text + data)


def edit_header(name: str, change: Callable[[dict, dict], object], folder: Path) -> None:
    """change: is given the tensor's entry and the whole header of its shard."""
    path = shard_of(folder, name)
    entries, data = header(path)
    change(entries[name], entries)
    with_header(path, entries, data)


def edit_bytes(name: str, change: Callable[[bytes], bytes], folder: Path) -> None:
    path = (
        shard_of(folder, name)
        if name.startswith(("model.", "lm_head")) and not name.endswith(".json")
        else folder / name
    )
    write(path, change(path.read_bytes()))


def typed_as(dtype: str) -> Callable[[dict, dict], object]:
    return lambda entry, _: entry.update(dtype=dtype)


def set_value(name: str, key: str, value: object, folder: Path) -> None:
    edit(folder / name, lambda c: c.pop(key, None) if value is DELETED else c.update({key: value}))


NORM, HEAD, ROUTER = "model.norm.weight", "lm_head.weight", "model.layers.1.mlp.router.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
TENSORS = [NORM, HEAD, ROUTER, BLOCKS, "model.embed_tokens.weight", "model.layers.2.mlp.experts.gate_up_proj_bias"]
SHAPES = [[-1, -64], [1.5], ["64"], [64 * 512], [HUGE], None, [True], [0, 64], [64, 512, 1], [], 0, [1] * 100]
MOVES = {
    "later": lambda begin, end: [begin + 2, end + 2],
    "earlier": lambda begin, end: [max(begin - 64, 0), max(begin - 64, 0) + end - begin + 64],
    "longer": lambda begin, end: [begin, end + 2],
    "shorter": lambda begin, end: [begin, end - 2],
    "turned": lambda begin, end: [end, begin],
    "negative": lambda begin, end: [begin - 10**9, end],
    "huge": lambda begin, end: [begin, HUGE],
    "far": lambda begin, end: [begin + 10**12, end + 10**12],
    "text": lambda begin, end: [str(begin), end],
    "one": lambda begin, end: [begin],
    "three": lambda begin, end: [begin, end, end],
    "null": lambda begin, end: None,
}
HEADERS = {"list": b"[]", "null": b"null", "not UTF-8": b'{"\xff": 1}', "deep": b"[" * 10**5, "NaN": b'{"a": NaN}'}


def shard_cases() -> dict[str, Callable[[Path], object]]:
    cases: dict[str, Callable[[Path], object]] = {}
    for name in TENSORS:
        for dtype in ("F16", "I16", "U16", "F8_E4M3", "F32", "BOOL", "X", "", 3, None, ["BF16"]):
            cases[f"{name} as {dtype}"] = partial(edit_header, name, typed_as(dtype))
        for shape in SHAPES:
            cases[f"{name} shape {shape}"] = partial(edit_header, name, lambda e, _, shape=shape: e.update(shape=shape))
        for what, move in MOVES.items():
            cases[f"{name} offsets {what}"] = partial(
                edit_header, name, lambda e, _, move=move: e.update(data_offsets=move(*e["data_offsets"]))
            )
        cases[f"{name} one field more"] = partial(edit_header, name, lambda e, _: e.update(more=1))
        cases[f"{name} no entry"] = partial(edit_header, name, lambda e, all, name=name: all.pop(name))
        cases[f"{name} entry is text"] = partial(edit_header, name, lambda e, all, name=name: all.update({name: "x"}))
        cases[f"{name} in the place of another"] = partial(edit_header, name, _take_anothers_place)
    for part in (0, 4, 7, 8, 100, 5000, -1, -64):
        cases[f"cut at {part}"] = partial(edit_bytes, NORM, lambda c, part=part: c[:part])
    for what, length in {"0": 0, "1": 1, "past the end": 1 << 40, "2^64": (1 << 64) - 1}.items():
        cases[f"header length {what}"] = partial(edit_bytes, NORM, lambda c, n=length: n.to_bytes(8, "little") + c[8:])
    for what, text in HEADERS.items():
        cases[f"header {what}"] = partial(
            edit_bytes, NORM, lambda c, t=text: len(t).to_bytes(8, "little") + t + c[-4096:]
        )
    cases["header names a tensor twice"] = _twice
    cases["bytes behind the end"] = partial(edit_bytes, NORM, lambda c: c + bytes(64))
    cases["data zero bytes shorter, header of another"] = _anothers_header
    return cases


def _take_anothers_place(entry: dict, entries: dict) -> None:
    other = next(e for n, e in entries.items() if n != "__metadata__" and e is not entry)
    entry["data_offsets"] = other["data_offsets"]


def _twice(folder: Path) -> None:
    path = shard_of(folder, NORM)
    entries, data = header(path)
    text = json.dumps(entries)
    with_header(path, f'{text[:-1]}, "{NORM}": {json.dumps(entries[NORM])}}}'.encode(), data)


def _anothers_header(folder: Path) -> None:
    first, last = shard_of(folder, NORM), shard_of(folder, "model.embed_tokens.weight")
    with_header(first, header(last)[0], header(first)[1])


PLACES = ["../x", "/etc/passwd", "..", ".", "", "sub/x", "a\0b", 3, None, [], {}, "config.json", "x" * 300, "no such"]


def index_cases() -> dict[str, Callable[[Path], object]]:
    cases = {}
    for file in PLACES:
        change = partial(edit, change=lambda c, file=file: c["weight_map"].update({NORM: file}))
        cases[f"index places a tensor in {file!r:.40}"] = lambda folder, change=change: change(folder / INDEX)
    outside = "../outside.safetensors"

    def lead_out(folder):
        shutil.copyfile(shard_of(folder, NORM), folder / outside)
        edit(folder / INDEX, lambda c: c["weight_map"].update({NORM: outside}))

    cases["index leads out to a whole shard"] = lead_out
    for value in (None, [], {}, "x", 3, DELETED):
        cases[f"weight_map {'deleted' if value is DELETED else value!r}"] = partial(
            set_value, INDEX, "weight_map", value
        )
    for name in TENSORS:
        cases[f"index without {name}"] = lambda f, n=name: edit(f / INDEX, lambda c: c["weight_map"].pop(n))
    for name in ("model.layers.4.mlp.router.weight", "model.layers.0.mlp.experts.down_proj", "model.layers.x", "other"):
        cases[f"index and shard with {name} more"] = partial(_one_more, name)
    cases["index: metadata gone"] = partial(set_value, INDEX, "metadata", DELETED)
    cases["index: total_size wrong"] = partial(set_value, INDEX, "metadata", {"total_size": -5})
    return (
        cases
        | no_text(INDEX)
        | {f"shard {what}": make for what, make in no_file("model-00001-of-00003.safetensors").items()}
    )


def _one_more(name: str, folder: Path) -> None:
    path = shard_of(folder, NORM)
    entries, data = header(path)
    entries[name] = {"dtype": "BF16", "shape": [8, 64], "data_offsets": [len(data), len(data) + 1024]}
    with_header(path, entries, data + bytes(1024))
    edit(folder / INDEX, lambda c: c["weight_map"].update({name: path.name}))


def no_file(name: str) -> dict[str, Callable[[Path], object]]:
    return {
        f"{name} is a folder": partial(instead, Path.mkdir, name),
        f"{name} is a FIFO": partial(instead, os.mkfifo, name),
        f"{name} is a link to itself": partial(instead, lambda path: path.symlink_to(path), name),
        f"{name} is missing": partial(instead, lambda path: None, name),
    }


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "not UTF-8": lambda content: content.replace(b'"', b'"\xff', 1),
    "null": lambda content: b"null",
    "a list": lambda content: b"[]",
    "text": lambda content: b'"x"',
    "deep": lambda content: b"[" * 10**5,
    "huge integer": lambda content: b'{"a": ' + b"9" * 5000 + b"}",
    "lone surrogate": lambda content: content.replace(b"{", b'{"\\ud800": 1, ', 1),
    "BOM": lambda content: b"\xef\xbb\xbf" + content,
    "UTF-16": lambda content: content.decode().encode("utf-16"),
    "zeros": lambda content: bytes(len(content)),
    "an empty object": lambda content: b"{}",
    "twice": lambda content: content + content,
}


def no_text(name: str) -> dict[str, Callable[[Path], object]]:
    return no_file(name) | {f"{name} {what}": partial(edit_bytes, name, change) for what, change in DAMAGES.items()}


VALUES = [None, "x", "", -1, 0, 1.5, HUGE, True, [], {}, ["x"], {"x": 1}, 1e999, -1e999, DELETED]


NOT_READ = (
    "architectures",
    "quantization_config",
    "attention_dropout",
    "initial_context_length",
    "transformers_version",
)
OTHERS = {
    "num_hidden_layers": 3,
    "num_local_experts": 4,
    "num_experts_per_tok": 9,
    "tie_word_embeddings": True,
    "torch_dtype": "float16",
    "layer_types": ["full_attention"] * 3,
    "num_attention_heads": 8,
    "head_dim": 16,
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 128,
    "num_key_value_heads": 3,
    "attention_bias": False,
    "hidden_act": "gelu",
}


def config_cases() -> dict[str, Callable[[Path], object]]:
    import world

    keys = [
        *world.CONFIG,
        "rope_parameters",
        "bos_token_id",
        "dtype",
        "swiglu_limit",
        "swiglu_alpha",
        "transformers_version",
    ]
    cases = {
        f"{key} = {'deleted' if value is DELETED else repr(value)}": partial(set_value, CONFIG, key, value)
        for key in keys
        for value in (VALUES[:2] if key in NOT_READ else VALUES)
    }
    for key in [*world.CONFIG["rope_scaling"], "rope_theta", "attention_factor"]:
        for value in VALUES:
            cases[f"rope_scaling.{key} = {'deleted' if value is DELETED else repr(value)}"] = partial(
                _set_rope, key, value
            )
    for key, value in OTHERS.items():
        cases[f"{key} = {value!r}"] = partial(set_value, CONFIG, key, value)
    return cases | no_text(CONFIG)


def _set_rope(key: str, value: object, folder: Path) -> None:
    def change(content):
        content["rope_scaling"].pop(key, None)
        if value is not DELETED:
            content["rope_scaling"][key] = value

    edit(folder / CONFIG, change)


TOKENIZER_KEYS = "version truncation added_tokens normalizer pre_tokenizer post_processor decoder model padding".split()
TOKENIZER_SETTINGS = (
    "tokenizer_class eos_token pad_token auto_map added_tokens_decoder model_max_length extra_special_tokens".split()
)


def tokenizer_cases() -> dict[str, Callable[[Path], object]]:
    cases = no_text("tokenizer.json") | no_text("tokenizer_config.json")
    for key in (
        "version",
        "truncation",
        "added_tokens",
        "normalizer",
        "pre_tokenizer",
        "post_processor",
        "decoder",
        "model",
    ):
        for value in ("x", 3, [], {}, [3], {"type": "x"}, DELETED):
            what = "deleted" if value is DELETED else repr(value)
            cases[f"tokenizer.json {key} = {what}"] = partial(set_value, "tokenizer.json", key, value)
    for key in TOKENIZER_SETTINGS:
        for value in (None, "x", 3, [], {}, [3], {"x": 1}, {"AutoTokenizer": "x.Y"}, DELETED):
            what = "deleted" if value is DELETED else repr(value)
            cases[f"tokenizer_config.json {key} = {what}"] = partial(set_value, "tokenizer_config.json", key, value)
    for what, change in {
        "a token's id beyond the vocabulary": lambda c: c["model"]["vocab"].update({"zzz": 512}),
        "a token's id huge": lambda c: c["model"]["vocab"].update({"zzz": 2**32 - 1}),
        "a token's id negative": lambda c: c["model"]["vocab"].update({"zzz": -1}),
        "a token's id text": lambda c: c["model"]["vocab"].update({"zzz": "1"}),
        "an added token beyond": lambda c: c["added_tokens"][-1].update(id=600),
        "a merge of nothing": lambda c: c["model"]["merges"].insert(0, ["zzz", "yyy"]),
        "merges are text": lambda c: c["model"].update(merges="x"),
        "vocab a list": lambda c: c["model"].update(vocab=[]),
    }.items():
        cases[f"tokenizer.json {what}"] = lambda folder, change=change: edit(folder / "tokenizer.json", change)
    return cases


def kinds() -> dict[str, dict[str, Callable[[Path], object]]]:
    return {
        "shards": shard_cases(),
        "index": index_cases(),
        "config.json": config_cases(),
        "tokenizer files": tokenizer_cases(),
    }


OWN, FOREIGN, HANG, RIGHT, WRONG = "own error", "foreign error", "hang", "accepted and right", "accepted and wrong"
OTHER = "accepted as another model"  # numbers differ, and so does the hash that a result carries


def outcome(folder: Path, expected: object) -> tuple[str, str]:
    """What becomes of a run with this checkpoint, and the error if there is one. expected: what ``run`` gives undamaged."""
    from eaftlib.errors import EaftError

    def ring(*_):
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(20)
    try:
        found = run(folder)
    except EaftError as error:
        return OWN, str(error)
    except TimeoutError:
        return HANG, ""
    except BaseException as error:  # a panic of the tokenizers library is no Exception
        return FOREIGN, repr(error)
    finally:
        signal.alarm(0)
    if found[1:] == expected[1:]:
        return RIGHT, ""
    return (OTHER if found[0] != expected[0] else WRONG), ""


def run(folder: Path) -> tuple:
    """Hashes of model and tokenizer; tokens of a text, and their scores to the bit: all that a checkpoint is for."""
    import numpy as np
    import world

    from eaftlib.engine import forward, placement
    from eaftlib.engine.weights import Weights
    from eaftlib.model.checkpoint import Checkpoint
    from eaftlib.text.packs import Blocks

    opened = Checkpoint(str(folder))
    ids = opened.tokenizer(world.conversation(1), add_special_tokens=False)["input_ids"]
    tokens = np.array([ids[:40]])
    blocks = Blocks("p", "all", tokens, np.ones_like(tokens, bool), 1, "")
    scores = forward.score(Weights(opened, placement.place("cpu", "float32")), blocks, progress=False).variants[0]
    hashes = opened.sha256, opened.tokenizer_sha256
    return hashes, ids, opened.tokenizer.eos_token_id, scores.nll.tobytes(), scores.entropy.tobytes()


def main() -> None:
    import tempfile

    sys.path.insert(0, str(Path(__file__).parents[1]))
    import world

    with tempfile.TemporaryDirectory() as scratch:
        model = world.write_checkpoint(Path(scratch) / "model")
        expected = run(model)
        for kind, cases in kinds().items():
            counts: Counter = Counter()
            for name, damage in cases.items():
                folder = copy(model, Path(scratch) / "copy")
                damage(folder)
                what, error = outcome(folder, expected)
                counts[what] += 1
                if what in (FOREIGN, HANG, WRONG, OTHER) or "-v" in sys.argv:
                    print(f"{kind}: {name}: {what} {error[:200]}")
                shutil.rmtree(folder)
            print(kind, len(cases), dict(counts), flush=True)


if __name__ == "__main__":
    main()
