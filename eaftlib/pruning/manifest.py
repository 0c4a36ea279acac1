"""What pruning leaves beside the weights: prune_manifest.json and expert_mapping.json, and what they must say."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, RootModel, StringConstraints, model_validator

Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[^/]*[^/.][^/]*$")]  # no path, and neither . nor ..


class Source(BaseModel):
    model_config = ConfigDict(strict=True)

    model_id: str
    revision: str | None
    model_sha256: Sha256


class ChosenBy(BaseModel):
    """How the experts that stay were chosen; criterion: None where all stay."""

    model_config = ConfigDict(strict=True)

    criterion: str | None
    keep_n: Count | None = None
    ranking_rows: str | None = None


class TrainingText(BaseModel):
    rows: str


class Recovered(BaseModel):
    """How small tensors were trained since, as ``recovery`` records it; init: the run begun with."""

    model_config = ConfigDict(strict=True)

    trained: list[str]
    parameters_share: Annotated[float, Field(ge=0, le=1)]
    tokens: Annotated[int, Field(ge=0)]
    text: TrainingText
    init: "Recovered | None" = None


class Manifest(BaseModel):
    model_config = ConfigDict(strict=True)

    schema_: Literal["eaft-prune/1"] = Field(alias="schema")
    source: Source
    num_experts_before: Count
    num_experts_after: Count
    chosen_by: ChosenBy
    bytes_before: Count
    bytes_after: Count
    sha256: Annotated[dict[FileName, Sha256], Field(min_length=1)]
    recovered: Recovered | None = None

    @model_validator(mode="after")
    def _fewer(self) -> Self:
        if self.num_experts_after > self.num_experts_before or self.bytes_after > self.bytes_before:
            raise ValueError("there is more after pruning than before")
        return self


class Mapping(RootModel[dict[str, dict[str, Annotated[int, Field(ge=0)]]]]):
    """Layer -> new id -> old id."""

    model_config = ConfigDict(strict=True)

    def problem(self, num_layers: int, manifest: Manifest) -> str | None:
        """What does not fit a checkpoint of so many layers, cut as the manifest says."""
        if list(self.root) != [str(layer) for layer in range(num_layers)]:
            return f"it has layers {list(self.root)}, expected 0 to {num_layers - 1}"
        new = [str(expert) for expert in range(manifest.num_experts_after)]
        for layer, old in self.root.items():
            ids = list(old.values())
            if list(old) != new or ids != sorted(set(ids)) or ids[-1] >= manifest.num_experts_before:
                return (
                    f"layer {layer} maps {list(old)} to {ids}, expected 0 to {len(new) - 1} to ascending ids below "
                    f"{manifest.num_experts_before}"
                )
        return None
