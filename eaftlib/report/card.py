"""The model card of a pruned or recovered checkpoint: README.md beside it, made from its manifest and its results."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..errors import CheckpointError, ResultError
from ..evaluation.compare import Comparison
from ..evaluation.gates import Check, Gates, Verdict, judge
from ..evaluation.results import Result
from ..files import write_atomically
from ..model.checkpoint import Checkpoint
from ..pruning.slicing import MANIFEST, read_manifest
from .markdown import plain
from .model import Recovered

CARD = "README.md"
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
# Words that open a licence's text, and what the hub calls it. Only texts that cannot be taken for another's.
_LICENCES = {
    r"Apache License\s+Version 2\.0, January 2004": "apache-2.0",
    r"MIT License\s+Copyright": "mit",
}


@dataclass(frozen=True)
class Licence:
    """As the hub calls it (``other``: a text it has no name for; ``unknown``), and where that was read."""

    name: str
    source: str
    file: str | None


@dataclass(frozen=True)
class Length:
    """One primary sequence length: what the tables need of it."""

    seq_len: int
    base_ppl: float
    ppl: float
    kept_tokens: int
    comparison: Comparison


@dataclass(frozen=True)
class Card:
    """Everything that a card says. base_model: None where the source was not fetched from the hub.

    baseline, gates, verdict: None where nobody has judged it yet; lengths and judged_on are empty then.
    """

    label: str
    source: str
    base_model: str | None
    licence: Licence
    manifest: dict
    recovered: tuple[dict, ...]
    baseline: str | None = None
    gates: Gates | None = None
    verdict: Verdict | None = None
    lengths: tuple[Length, ...] = ()
    judged_on: dict = field(default_factory=dict)

    @property
    def trained(self) -> Recovered | None:
        first = self.recovered[0] if self.recovered else None
        return first and Recovered(first["parameters_share"], first["tokens"])


def build(checkpoint: Checkpoint, result: Result, baseline: Result, gates: Gates) -> Card:
    """Raises CheckpointError where the checkpoint has no manifest; ResultError unless ``result`` is of this checkpoint,
    ``baseline`` of the model that it was cut from, both comparable, and both have every primary sequence length.
    """
    card = unjudged(checkpoint)
    manifest = card.manifest
    _require_scores_of(result, checkpoint.sha256, manifest["bytes_after"], f"the checkpoint {checkpoint.folder}")
    source = manifest["source"]
    _require_scores_of(baseline, source["model_sha256"], manifest["bytes_before"], f"its source, {source['model_id']}")
    verdict = judge(result, baseline, gates)
    if verdict.missing:
        raise ResultError(
            f"{result.path} and {baseline.path} give no verdict: {gates.primary_pack} at {list(verdict.missing)} is missing "
            f"in one of them. Evaluate both there: {gates.name} needs {list(gates.primary_seq_lens)}."
        )
    return replace(
        card,
        label=result.label,
        baseline=baseline.label,
        gates=gates,
        verdict=verdict,
        lengths=tuple(
            _length(result, baseline, gates.primary_pack, n, found) for n, found in verdict.comparisons.items()
        ),
        judged_on=result.meta,
    )


def unjudged(checkpoint: Checkpoint) -> Card:
    """Of a checkpoint that nobody has evaluated yet, under its folder's name.

    Raises CheckpointError where it has no manifest.
    """
    manifest = read_manifest(checkpoint)
    if not manifest:
        raise CheckpointError(f"{checkpoint.folder} has no {MANIFEST}: a card is for what 02_prune or 05_recover wrote")
    source = manifest["source"]
    return Card(
        label=checkpoint.folder.name,
        source=source["model_id"],
        base_model=source["model_id"] if source.get("revision") else None,
        licence=_licence(checkpoint.folder, source),
        manifest=manifest,
        recovered=tuple(_runs(manifest.get("recovered"))),
    )


def write(card: Card, folder: Path, name: str | None = None) -> Path:
    """README.md in ``folder``; ``name``: the repository it will be in, if that is known. No manifest lists this file."""
    text = markdown(card, name)
    write_atomically(folder / CARD, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))
    return folder / CARD


def markdown(card: Card, name: str | None = None) -> str:
    """The same card gives the same bytes. Whatever others may have named is escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eaftlib.report", "templates"),
        autoescape=False,  # it is Markdown; finalize escapes
        finalize=lambda value: value if isinstance(value, _Markdown) else plain(value),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    return environment.get_template("card.md.jinja").render(
        card=card, front_matter=_Markdown(_front_matter(card)), name=_Markdown(name or "."), deltas=_deltas
    )


class _Markdown(str):
    """Text that is Markdown already."""


def _require_scores_of(result: Result, sha256: str, nbytes: int, what: str) -> None:
    """The result must be of this model, and of all of it: not of a keep-set that was scored without being written."""
    found = result.meta.get("model_sha256")
    if found != sha256:
        raise ResultError(
            f"{result.path} is not a result of {what}: its model_sha256 is {found}, expected {sha256}. Give the one that "
            "03_evaluate wrote for it."
        )
    if result.meta.get("bytes_total") != nbytes:
        raise ResultError(
            f"{result.path} scores a keep-set of {what}, {result.meta.get('bytes_total')} of its {nbytes} bytes, not the "
            "whole of it. Evaluate it without keep_set."
        )


def _runs(recovered: dict | None) -> Iterator[dict]:
    """The training runs behind a checkpoint, the last one first."""
    while recovered:
        yield recovered
        recovered = recovered.get("init")


def _length(result: Result, baseline: Result, pack: str, seq_len: int, comparison: Comparison) -> Length:
    own, base = (r.entries[pack, seq_len]["model"] for r in (result, baseline))
    return Length(seq_len, base["ppl"], own["ppl"], own["kept_tokens"], comparison)


def _deltas(card: Card, length: Length) -> Iterator[tuple[str, ...]]:
    """(gate, value, 90 % interval, limit, v1, evidence) of each check at one length."""
    forms = {"dPPL": "+.3f", "dCC": "+.6f", "d mean p": "+.4f", "JS2D": ".4f"}
    for check in card.verdict.checks:
        if check.seq_len == length.seq_len:
            form = forms[check.gate]
            ends = check.interval and "{} to {}".format(*(format(end, form) for end in check.interval))
            limit = format(check.limit, form.lstrip("+"))
            yield check.gate, format(check.value, form), ends or "not known", limit, check.status, _evidence(check)


def _evidence(check: Check) -> str:
    blocks = f" ({check.blocks_to_decide:,} blocks would decide)" if check.blocks_to_decide else ""
    return (check.evidence or "not known") + blocks


def _licence(folder: Path, source: dict) -> Licence:
    """By the text of a licence that came with the model, else by what the source's own card says."""
    file = next((name for name in _LICENCE_FILES if (folder / name).is_file()), None)
    text = (folder / file).read_text(errors="replace") if file else ""
    for words, name in _LICENCES.items():
        if re.search(words, text[:500]):
            return Licence(name, f"the source's file {file}", file)
    if declared := _declared_licence(source):
        return Licence(declared, "the source's model card", file)
    return Licence("other", f"the source's file {file}", file) if file else Licence("unknown", "", None)


def _declared_licence(source: dict) -> str | None:
    """What the front matter of the source's card says, if that card is on this machine."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    folder, revision = Path(source["model_id"]), source.get("revision")
    found = try_to_load_from_cache(source["model_id"], CARD, revision=revision) if revision else folder / CARD
    if not isinstance(found, str | Path) or not Path(found).is_file():  # the cache may know that there is none
        return None
    declared = ModelCard.load(found, ignore_metadata_errors=True).data.to_dict().get("license")
    return declared if isinstance(declared, str) else None


def _front_matter(card: Card) -> str:
    """YAML as the hub reads it; a name is quoted wherever YAML would take it for more."""
    import yaml

    values: dict[str, object] = {"base_model": card.base_model} if card.base_model else {}
    values["license"] = card.licence.name
    if card.licence.name == "other":
        values |= {"license_name": "see-license-file", "license_link": card.licence.file}
    values |= {"library_name": "transformers", "pipeline_tag": "text-generation"}
    values["tags"] = ["mixture-of-experts", "expert-pruning", "eaft", *(["distillation"] if card.recovered else [])]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=1000)
