"""The shapes of result and gates JSON, checked on reading. Results of the earlier shape lack ``schema`` and ``blocks``."""

from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ..files import FILE_NAME

SCHEMA = "eaft-result/1"
GATES_SCHEMA = "eaft-gates/1"
MOST = 1 << 40  # of any count: sums of them stay exact
Finite = Annotated[float, Field(allow_inf_nan=False, ge=-1e15, le=1e15)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Length = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,8}$")]
Count = Annotated[int, Field(ge=0, le=MOST)]
Positive = Annotated[int, Field(gt=0, le=MOST)]
Limit = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Sha256 = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class Histogram(_Part):
    edges: list[Finite]
    counts: list[Count]


class Histogram2D(_Part):
    x_edges: list[Finite]
    y_edges: list[Finite]
    counts: list[Count]
    xbins: Positive
    ybins: Positive

    @model_validator(mode="after")
    def _sizes_agree(self):
        sizes = (len(self.counts), len(self.x_edges), len(self.y_edges))
        expected = (self.xbins * self.ybins, self.xbins + 1, self.ybins + 1)
        if sizes != expected:
            raise ValueError(f"counts, x_edges and y_edges have lengths {sizes}, expected {expected}")
        return self


class Quadrants(_Part):
    LL: Share
    LH: Share
    HL: Share
    HH: Share


class BlockSums(_Part):
    kept: list[Count]
    nll_sum: list[Finite]
    prob_sum: list[Finite]
    entropy_sum: list[Finite]
    conflicts: list[Finite]


class ModelEntry(_Part):
    """What has a default may be absent, but is never null."""

    ppl: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    kept_tokens: Positive
    mean_prob: Share
    mean_entropy: Share
    mean_nll: Annotated[float, Field(ge=-1, le=700)]  # exp of it is a number
    var_nll: Annotated[float, Field(ge=0, allow_inf_nan=False)] = None
    p_thr: Share
    h_thr: Share
    cc_rate: Share
    cc_count: Count
    quadrants: Quadrants = None
    hist2d_x_H: Histogram2D
    hist1d_x: Histogram = None
    hist1d_H: Histogram = None
    blocks: BlockSums = None
    tok_s_pred: Annotated[float, Field(ge=0, allow_inf_nan=False)] = None
    kl_to_base: Finite = None
    top1_agreement: Share = None


class SequenceEntry(_Part):
    rows_seen: Count
    rows_sha256: Sha256 = None
    input_sha256: Sha256 = None
    model: ModelEntry


class PackEntry(_Part):
    pack: Annotated[str, Field(min_length=1)]
    seq: Annotated[dict[Length, SequenceEntry], Field(min_length=1)]


class TrainingText(_Part):
    rows: str


class Recovered(_Part):
    """How a pruned model's small tensors were trained.

    parameters_share: of the whole model's parameters; tokens: repeats and earlier runs counted; init: the run begun with.
    """

    trained: list[str]
    parameters_share: Share
    tokens: Count
    text: TrainingText
    init: "Recovered | None" = None


class ChosenBy(_Part):
    """How the experts that stay were chosen, as a report says it."""

    criterion: str | None = None
    keep_n: Positive | None = None
    ranking_rows: str | None = None


class Meta(_Part):
    """Earlier files may lack any of it."""

    label: Annotated[str, Field(min_length=1)] | None = None
    model_id: str | None = None
    model_sha256: Sha256 | None = None
    tokenizer_sha256: Sha256 | None = None
    tokens_sha256: Sha256 | None = None
    eos_token_id: Count | None = None
    num_experts: Positive | None = None
    top_k: Positive | None = None
    bytes_total: Positive | None = None
    keep_set: ChosenBy | None = None
    recovered: Recovered | None = None
    rows: str | None = None
    num_blocks: Positive | dict[Length, Positive] | None = None
    entropy_topk: Annotated[int, Field(ge=2)] | None = None
    cc_quantile: Annotated[float, Field(gt=0, lt=1)] | None = None
    seq_lens: list[Positive] | None = None
    scored_with: list[str] | None = None
    dataset_repo: str | None = None
    pack_files: list[str] | None = None
    device: str | None = None
    gpu_name: str | None = None
    dtype: str | None = None


class CompleteMeta(Meta):
    """What every file with a schema says: without it, that two results may be compared is not known."""

    label: Annotated[str, Field(pattern=f"^{FILE_NAME}$")]
    tokenizer_sha256: Sha256
    tokens_sha256: Sha256
    rows: Literal["all", "calib", "eval"]
    num_blocks: Positive | dict[Length, Positive]
    entropy_topk: Annotated[int, Field(ge=2)]
    cc_quantile: Annotated[float, Field(gt=0, lt=1)]


class EarlierFile(_Part):
    meta: Meta
    packs: Annotated[list[PackEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _every_pack_once(self):
        times = Counter(entry.pack for entry in self.packs)
        if twice := next((name for name, count in times.items() if count > 1), None):
            raise ValueError(f"packs: {twice!r} is there {times[twice]} times, expected once")
        return self


class CompleteModelEntry(ModelEntry):
    blocks: BlockSums


class CompleteEntry(SequenceEntry):
    rows_sha256: Sha256
    model: CompleteModelEntry


class CompletePack(PackEntry):
    seq: Annotated[dict[Length, CompleteEntry], Field(min_length=1)]


class ResultFile(EarlierFile):
    schema_: Literal[SCHEMA] = Field(alias="schema")
    meta: CompleteMeta
    packs: Annotated[list[CompletePack], Field(min_length=1)]


def shape_of(content: Mapping[str, Any]) -> type[EarlierFile]:
    """What a file must be: one without ``schema`` is of the earlier shape, which knows no tokens beside it."""
    meta = content.get("meta")
    is_ours = "schema" in content or (isinstance(meta, dict) and "tokens_sha256" in meta)
    return ResultFile if is_ours else EarlierFile


class Limits(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    ppl_absolute: Limit
    ppl_relative: Limit
    cc_rate: Limit
    mean_prob: Limit
    js2d: Limit


class GatesFile(_Part):
    schema_: Literal[GATES_SCHEMA] = Field(alias="schema")
    name: Annotated[str, Field(min_length=1)]
    primary_pack: Annotated[str, Field(min_length=1)]
    primary_seq_lens: Annotated[list[Positive], Field(min_length=1)]
    limits: Limits

    @field_validator("primary_seq_lens")
    @classmethod
    def _each_once(cls, lengths: list[int]) -> list[int]:
        if len(set(lengths)) < len(lengths):
            raise ValueError(f"found {lengths}, expected each once")
        return lengths
