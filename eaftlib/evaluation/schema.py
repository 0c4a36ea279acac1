"""The shape of a result JSON, checked on reading. Files of the earlier shape lack ``schema`` and ``blocks``."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

SCHEMA = "eaft-result/1"
Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Length = Annotated[str, Field(pattern=r"^[1-9][0-9]*$")]
Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")


class Histogram2D(_Part):
    x_edges: list[Finite]
    y_edges: list[Finite]
    counts: list[Count]
    xbins: Count
    ybins: Count

    @model_validator(mode="after")
    def _sizes_agree(self):
        sizes = (len(self.counts), len(self.x_edges), len(self.y_edges))
        expected = (self.xbins * self.ybins, self.xbins + 1, self.ybins + 1)
        if sizes != expected:
            raise ValueError(f"counts, x_edges and y_edges have lengths {sizes}, expected {expected}")
        return self


class BlockSums(_Part):
    kept: list[Count]
    nll_sum: list[Finite]
    prob_sum: list[Finite]
    entropy_sum: list[Finite]
    conflicts: list[Finite]


class ModelEntry(_Part):
    ppl: Finite
    kept_tokens: Annotated[int, Field(gt=0)]
    mean_prob: Share
    mean_entropy: Share
    mean_nll: Finite
    p_thr: Share
    h_thr: Share
    cc_rate: Share
    cc_count: Count
    hist2d_x_H: Histogram2D
    blocks: BlockSums | None = None


class SequenceEntry(_Part):
    rows_seen: Count
    rows_sha256: str | None = None
    input_sha256: str | None = None
    model: ModelEntry


class PackEntry(_Part):
    pack: str
    seq: dict[Length, SequenceEntry]


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


class Meta(_Part):
    recovered: Recovered | None = None


class ResultFile(_Part):
    schema_: str | None = Field(None, alias="schema")
    meta: Meta
    packs: list[PackEntry]

    @model_validator(mode="after")
    def _known_schema(self):
        if self.schema_ not in (None, SCHEMA):
            raise ValueError(f"schema is {self.schema_!r}, expected {SCHEMA!r} or none (an earlier file)")
        if self.schema_ and any(
            s.rows_sha256 is None or s.model.blocks is None for p in self.packs for s in p.seq.values()
        ):
            raise ValueError(f"a file of schema {SCHEMA!r} needs rows_sha256 and blocks in every entry")
        return self
