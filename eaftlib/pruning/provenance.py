"""What a trace came from, and the types of fields that files of this room share. Imported late: pydantic."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Finite = Annotated[float, Field(allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, lt=1, strict=True)]
Loss = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]
Count = Annotated[int, Field(ge=0, lt=2**63, strict=True)]
Positive = Annotated[int, Field(gt=0, lt=2**63, strict=True)]
Id = Annotated[int, Field(ge=0, lt=2**31, strict=True)]
Name = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class TraceProvenance(Part):
    """What a trace came from. Earlier ones lack ``eos_token_id``; those without Gram matrices lack ``recon_tokens``."""

    model_id: Name
    model_sha256: Sha256
    tokenizer_sha256: Sha256
    eos_token_id: Id | None = None
    pack: Name
    rows: Literal["all", "calib", "eval"]
    rows_seen: Count
    rows_sha256: Sha256
    seq_len: Positive
    num_blocks: Positive
    kept_tokens: Positive
    entropy_topk: Positive
    device: Name
    dtype: Name
    recon_tokens: Positive | None = None
    recon_tokens_found: Positive | None = None
