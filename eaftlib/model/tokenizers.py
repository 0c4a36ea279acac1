"""A checkpoint's tokenizer, as transformers reads it, which fits the model and is wholly in the file that is hashed."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ..errors import CheckpointError
from ..files import read_json

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")  # read where they are there
ADVICE = "copy the model's tokenizer files there"


def read(folder: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    """Raises CheckpointError unless it is whole, gives offsets, has an EOS token, and no id is ``vocab_size`` or more."""
    file = require_file(folder)
    content = read_json(file, CheckpointError, ADVICE)
    for settings in SETTINGS_FILES:
        if (folder / settings).exists():
            read_json(folder / settings, CheckpointError, ADVICE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        # For a damaged file tokenizers raises Exception itself, transformers whatever the wrong type of a field leads to.
        raise CheckpointError(f"{file}: transformers cannot read the tokenizer ({error!r}); {ADVICE}") from error
    if not tokenizer.is_fast or tokenizer.eos_token_id is None:
        raise CheckpointError(f"{folder}: scoring needs a fast tokenizer (for offsets) with an EOS token")
    if not isinstance(tokenizer.model_max_length, int | float):
        raise CheckpointError(
            f"{folder / SETTINGS_FILES[0]}: model_max_length is {tokenizer.model_max_length!r}, expected a number; {ADVICE}"
        )
    _require_ids(file, tokenizer, vocab_size)
    _require_special(file, tokenizer, content)
    return tokenizer


def require_file(folder: Path) -> Path:
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise CheckpointError(f"{folder} has no {TOKENIZER_FILE}; {ADVICE}")
    return file


def _require_ids(file: Path, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> None:
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if largest >= vocab_size:
        raise CheckpointError(
            f"{file}: token {token!r} has id {largest}, config.json has vocab_size {vocab_size}: the model has no such "
            f"token; {ADVICE}"
        )


def _require_special(file: Path, tokenizer: PreTrainedTokenizerFast, content: dict) -> None:
    """Any other special token transformers would add, and cut texts there, without a trace in the tokenizer's hash."""
    added = {token["content"] for token in content["added_tokens"]}
    if unknown := [token for token in tokenizer.all_special_tokens if token not in added]:
        raise CheckpointError(
            f"{file} has no special token {unknown[0]!r}, which {SETTINGS_FILES[0]} names; {ADVICE}, all of one model"
        )
