"""Architectures that this library knows; one module each, found by a configuration's ``model_type``."""

from .family import Family
from .gpt_oss import GptOss

FAMILIES: dict[str, Family] = {kind: family for family in (GptOss(),) for kind in family.model_types}
