"""config.json: a configuration whose every field that a number depends on is there, of its type and within its range."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from ..errors import CheckpointError
from ..files import read_json, typed
from .families import FAMILIES, Family

CONFIG_FILE = "config.json"
ADVICE = "take the config.json that the weights came with"


def read_config(folder: Path) -> tuple[Family, PreTrainedConfig]:
    """The architecture and its configuration. Raises CheckpointError for a family or a value that there is not."""
    file = folder / CONFIG_FILE
    if not file.exists():
        raise CheckpointError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
    settings = read_json(file, CheckpointError, ADVICE)
    kind = settings.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        known = (f"{kind!r} ({of})" for family in FAMILIES.values() for kind, of in family.model_types.items())
        raise CheckpointError(f"{folder}: model_type is {kind!r}; supported: {'; '.join(known)}")
    typed(settings, family.settings(), f"{file}", CheckpointError, ADVICE)
    try:
        return family, family.config_class.from_dict(settings)
    except (StrictDataclassError, TypeError, ValueError, KeyError, AttributeError) as error:
        # All that transformers' own checks of a configuration were seen to raise
        raise CheckpointError(f"{file}: transformers refuses it ({error}); {ADVICE}") from error
