"""The notebooks that run on Kaggle: what each needs beside its parameters, what it leaves, how that is verified."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, PositiveInt

from .. import params, recovery
from ..errors import ResultError
from ..evaluation import results
from ..files import read_json, read_typed, sha256
from ..pruning.criteria import RECON
from ..text.packs import UNION
from .ledger import Entry

Parameters = dict[str, Any]

# recovery.recover's and pruning.slicing's, which cannot be imported without torch
_STATE = "state.safetensors"
_MANIFEST, _MAPPING, _MANIFEST_SCHEMA = "prune_manifest.json", "expert_mapping.json", "eaft-prune/1"
_NO_SETTINGS = {"device", "dtype", "max_gpu_memory", "publish_to", "out_dir"}  # where a recovery runs, not what it is


@dataclass(frozen=True)
class Input:
    """A path that parameters name, and what of it is carried when it lies here.

    missing: what to say when it does not; None where the hub may have it.
    """

    name: str
    files: Callable[[Path], list[Path]]
    missing: str | None = None


@dataclass(frozen=True)
class Job:
    """One notebook; its parameters are of the class that ``params.NOTEBOOKS`` gives.

    inputs: what the parameters name. files: names of the files that it leaves and that others read. verify: raises
    ResultError unless a JSON among them is what this run was asked for. folder: where it leaves them; None: in none of
    their own, and ``brings`` says where they lie beside what is not brought back. partial: what another
    session can go on from besides the journal of a pass, and how much of the work that holds; unit: in what. tokens: how many
    go through the model, once for each model, or None where parameters do not say. speeds: of a result, tokens and tokens/s of
    its parts. trains: whether a token costs a training step's. gpu: whether it computes.
    """

    inputs: Callable[[Parameters], list[Input]]
    files: Callable[[Parameters], list[str]]
    verify: Callable[[Path, Entry], None]
    folder: Callable[[Parameters], str | None] = lambda parameters: parameters["out_dir"]
    brings: Callable[[Parameters], list[str]] = lambda parameters: []
    partial: Callable[[Path], tuple[list[Path], int]] = lambda folder: ([], 0)
    unit: str = "results"
    tokens: Callable[[Parameters], int | None] = lambda parameters: None
    speeds: Callable[[Path], list[tuple[int, float]]] = lambda folder: []
    trains: bool = False
    gpu: bool = True


def _model_and_ranking(parameters: Parameters) -> list[Input]:
    return [Input(parameters["model"], _whole_folder), _ranking(parameters["ranking"])]


def _manifest_and_mapping(parameters: Parameters) -> list[str]:
    return [f"{parameters['out_dir']}/{name}" for name in (_MANIFEST, _MAPPING)]


def _sources(parameters: Parameters) -> list[Input]:
    return [Input(parameters[name], _whole_folder) for name in ("model", "packs")]


def _whole_folder(folder: Path) -> list[Path]:
    return sorted(f for f in folder.rglob("*") if f.is_file())


def _sources_and_rankings(parameters: Parameters) -> list[Input]:
    keep_sets = params.Evaluate.check(parameters).keep_sets.values()
    return _sources(parameters) + [_ranking(keep["ranking"]) for keep in keep_sets if keep]


def _sources_ranking_and_init(parameters: Parameters) -> list[Input]:
    inputs = [*_sources(parameters), _ranking(parameters["ranking"])]
    if init := parameters["init"]:
        advice = f"give the {recovery.TENSORS} of an earlier recovery, or None to begin with the pruned model"
        inputs.append(Input(init, lambda file: [file], f"init: {init} does not exist; {advice}"))
    return inputs


def _ranking(name: str) -> Input:
    advice = "run 01_rank first, or copy a ranking there that came from Kaggle"
    return Input(name, _without_its_trace, f"ranking: {name} does not exist; {advice}")


def _without_its_trace(path: Path) -> list[Path]:
    """The trace beside a ranking is large, and not needed to choose by it."""
    file = path / "ranking.json" if path.is_dir() else path
    return [f for f in (file, file.with_name("saliency.parquet")) if f.is_file()]


def _result_files(parameters: Parameters) -> list[str]:
    keep_sets = params.Evaluate.check(parameters).keep_sets
    return [f"{label}{ending}" for label in keep_sets for ending in (".json", ".tokens.parquet")]


def _verify_ranking(path: Path, entry: Entry) -> None:
    from ..pruning.ranking import read_ranking  # loads torch, which nothing else here needs

    ranking, asked = read_ranking(path), entry.params
    names = ("rows", "seq_len", "num_blocks", "entropy_topk", "cc_quantile", "w_good", "w_uncertain", "w_conflict")
    names = (*names, "align", "seed", "packs", "pack_files", *(["recon_tokens"] if RECON in asked["criteria"] else []))
    _require(path, ranking.get("provenance", {}), {name: asked[name] for name in names} | {"model_id": asked["model"]})
    if set(ranking.get("criteria", {})) != set(asked["criteria"]):
        raise ResultError(f"{path.name}: criteria are {sorted(ranking.get('criteria', {}))}, not {asked['criteria']}")


class _Manifest(BaseModel):
    """What is verified of it."""

    schema_: Annotated[Literal[_MANIFEST_SCHEMA], Field(alias="schema")]
    source: dict[str, Any]
    num_experts_before: PositiveInt
    num_experts_after: PositiveInt
    chosen_by: dict[str, Any]
    sha256: dict[str, str]


def _verify_prune(path: Path, entry: Entry) -> None:
    """The manifest says what was asked for, and that the mapping is its own."""
    asked = entry.params
    manifest = read_typed(path.with_name(_MANIFEST), _Manifest, ResultError, "pull again")
    _require(path, manifest.source, {"model_id": asked["model"]})
    keep = params.Prune.check(asked).keep_set
    expected = _chosen(keep, {"num_experts": manifest.num_experts_before, "top_k": 1})
    expected |= {name: keep[name] for name in ("core_top_m", "keep_super")}
    _require(path, manifest.chosen_by, expected)
    _require(path, {"num_experts_after": manifest.num_experts_after}, {"num_experts_after": expected["keep_n"]})
    _require(path, manifest.sha256, {_MAPPING: sha256(path.with_name(_MAPPING))})


def _verify_result(path: Path, entry: Entry) -> None:
    result, asked = results.read(path), entry.params
    expected = {name: asked[name] for name in ("rows", "entropy_topk", "cc_quantile")}
    expected["num_blocks"] = params.Evaluate.check(asked).blocks_by_length
    expected |= {"model_id": asked["model"], "dataset_repo": asked["packs"], "label": path.stem}
    expected |= {"code_sha256": entry.code_sha256}
    if asked["pack_files"] is not None:
        expected["pack_files"] = asked["pack_files"]
    _require(path, result.meta, expected)
    if keep := params.Evaluate.check(asked).keep_sets[path.stem]:
        _require(path, result.meta["keep_set"] or {}, _chosen(keep, result.meta))
    packs = asked["only"] or [*(Path(file).stem for file in result.meta["pack_files"]), UNION]
    for pack in packs:
        for seq_len in asked["seq_lens"]:
            if (pack, seq_len) not in result.entries:
                raise ResultError(f"{path.name} has no {pack} at {seq_len}")
            result.tokens(pack, seq_len)


def _finished_passes(folder: Path) -> tuple[list[Path], int]:
    """Results of whole passes, each with its tokens."""
    sound = {f: passes for f in sorted(folder.glob("*.json")) if (passes := _passes(f))}
    return [f for json_file in sound for f in (json_file, results.tokens_path(json_file))], sum(sound.values())


def _passes(path: Path) -> int:
    """How many a result holds; 0 where it cannot be read: a session that was killed may have cut it short."""
    try:
        found = results.read(path)
        results.read_tokens(results.tokens_path(path), found.meta.get("num_blocks"))
    except ResultError:
        return 0
    return len(found.entries)


def _scored_tokens(parameters: Parameters) -> int | None:
    """Every pack at every length, once for each model."""
    asked = params.Evaluate.check(parameters)
    blocks = asked.blocks_by_length
    if asked.only is not None:
        packs = len(asked.only)
    elif asked.pack_files is not None:
        packs = len(asked.pack_files) + 1  # and UNION
    elif Path(asked.packs).is_dir():
        packs = len(list(Path(asked.packs).rglob("*.parquet"))) + 1
    else:
        return None
    at_each = ((blocks if isinstance(blocks, int) else blocks[str(n)]) * n for n in asked.seq_lens)
    return packs * sum(at_each) * len(asked.keep_sets)


def _ranked_tokens(parameters: Parameters) -> int:
    return parameters["num_blocks"] * parameters["seq_len"]


def _trained_tokens(parameters: Parameters) -> int:
    """Of all steps, and of the looks at the text that is held back: cheaper, counted as if trained on."""
    looks = 1 + parameters["steps"] // parameters["check_every"]
    blocks = parameters["steps"] * parameters["batch_blocks"] + looks * parameters["held_out_blocks"]
    return blocks * parameters["seq_len"]


def _scoring_speeds(folder: Path) -> list[tuple[int, float]]:
    speeds = []
    for result in results.read_all([str(folder)]):
        for (_, seq_len), entry in result.entries.items():
            blocks = result.meta["num_blocks"]
            tokens = (blocks if isinstance(blocks, int) else blocks[str(seq_len)]) * seq_len
            speeds.append((tokens, entry["model"]["tok_s_pred"]))
    return speeds


def _training_speeds(folder: Path) -> list[tuple[int, float]]:
    last = read_json(folder / recovery.RECORD, ResultError, "pull again")["curve"][-1]
    return [(last["tokens"], last["tokens"] / last["seconds"])] if last["tokens"] else []


def _steps_so_far(folder: Path) -> tuple[list[Path], int]:
    """A training's state, which goes on at its last look."""
    from safetensors import SafetensorError, safe_open

    path = folder / _STATE
    try:
        with safe_open(path, "numpy") as opened:
            curve = json.loads(opened.metadata()["curve"])
    except (OSError, SafetensorError):  # there is none, or it was cut short
        return [], 0
    return [path], curve[-1]["step"]


def _verify_recovery(path: Path, entry: Entry) -> None:
    from pydantic import ValidationError

    from ..evaluation.schema import Recovered

    content = read_json(path, ResultError, "pull again")
    _require(path, content, {"schema": recovery.SCHEMA})
    settings = {name: value for name, value in entry.params.items() if name not in _NO_SETTINGS}
    found = content.get("settings")
    _require(path, found if isinstance(found, dict) else {}, settings)
    try:
        Recovered.model_validate(content.get("recovered"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("recovered", *first["loc"])))
        raise ResultError(f"{path.name}: {where}: {first['msg']}; push the run again") from error
    _require_tensors(path.with_name(recovery.TENSORS))


def _require_tensors(path: Path) -> None:
    """Raises ResultError unless the file is one of safetensors and holds some. Values are not read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as opened:
            names = list(opened.keys())
    except (OSError, SafetensorError) as cause:
        raise ResultError(f"{path.name} cannot be read ({cause}); pull again") from cause
    if not names:
        raise ResultError(f"{path.name} holds no tensor, expected those that were trained; push the run again")


def _chosen(keep: Parameters, meta: dict[str, Any]) -> dict[str, Any]:
    """What a result says of the keep-set that was asked for."""
    from ..pruning.keepsets import keep_count  # loads torch

    count = {name: keep[name] for name in ("keep_frac", "keep_n", "multiple_of")}
    return {"criterion": keep["criterion"], "keep_n": keep_count(meta["num_experts"], meta["top_k"], **count)}


def _require(path: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, value in expected.items():
        if found.get(name) != value:
            raise ResultError(
                f"{path.name}: {name} is {found.get(name)}, expected {value}: this is another run's result"
            )


JOBS = {
    "01_rank": Job(
        _sources,
        lambda parameters: ["ranking.json", "saliency.parquet"],
        _verify_ranking,
        tokens=_ranked_tokens,
    ),
    "02_prune": Job(
        _model_and_ranking,
        lambda parameters: [_MANIFEST, _MAPPING],  # the checkpoint has gigabytes: it is published, or cut again
        _verify_prune,
        folder=lambda parameters: None,
        brings=_manifest_and_mapping,
        gpu=False,
    ),
    "03_evaluate": Job(
        _sources_and_rankings,
        _result_files,
        _verify_result,
        partial=_finished_passes,
        unit="passes",
        tokens=_scored_tokens,
        speeds=_scoring_speeds,
    ),
    "05_recover": Job(
        _sources_ranking_and_init,
        lambda parameters: [recovery.RECORD, recovery.TENSORS],  # of these the checkpoint can be made anywhere
        _verify_recovery,
        folder=lambda parameters: f"{Path(parameters['out_dir'])}.training",
        partial=_steps_so_far,
        unit="steps",
        tokens=_trained_tokens,
        speeds=_training_speeds,
        trains=True,
    ),
}
