"""The shape of prune_manifest.json, checked on reading. Imported late: pydantic."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from .provenance import Count, Name, Part, Positive, Sha256

FileName = Annotated[str, Field(pattern=r"^[^/\\\x00]+$")]  # in the checkpoint's folder, never outside


class Source(Part):
    model_id: Name
    revision: str | None = None
    model_sha256: Sha256


class ChosenBy(Part):
    criterion: str | None
    keep_n: Positive | None = None
    ranking_rows: str | None = None


class TrainingText(Part):
    rows: str


class Training(Part):
    """How small tensors were trained; init: the run begun with."""

    trained: list[str]
    parameters_share: Annotated[float, Field(ge=0, le=1, strict=True)]
    tokens: Count
    text: TrainingText
    init: Training | None = None


class Manifest(Part):
    schema_: Literal["eaft-prune/1"] = Field(alias="schema")
    source: Source
    num_experts_before: Positive
    num_experts_after: Positive
    chosen_by: ChosenBy
    bytes_before: Count
    bytes_after: Count
    sha256: Annotated[dict[FileName, Sha256], Field(min_length=1)]
    recovered: Training | None = None

    @model_validator(mode="after")
    def _no_more_than_before(self):
        if self.num_experts_after > self.num_experts_before:
            raise ValueError(
                f"num_experts_after is {self.num_experts_after}, expected at most num_experts_before, {self.num_experts_before}"
            )
        return self
