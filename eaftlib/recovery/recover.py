"""From a checkpoint and a keep-set to a pruned checkpoint whose small tensors were trained to make up for the loss."""

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from .. import project
from ..engine import forward, ranks
from ..engine.launch import over_gpus
from ..engine.placement import Placement
from ..engine.traversal import micro_batches
from ..engine.weights import Weights
from ..errors import CheckpointError, ParameterError, ResultError
from ..files import read_json, require_writable_folder, sha256, write_atomically, write_json
from ..model.checkpoint import Checkpoint
from ..pruning import slicing
from ..pruning.keepsets import KeepSet
from ..text.packs import Blocks
from . import RECORD, SCHEMA, TENSORS
from .loop import Look, Objective, Recovery, Schedule, State, hold_back
from .trained import Trained

STATE = "state.safetensors"


def training_folder(out_dir: str | Path) -> Path:
    """Where a run leaves its state, its curve (recovery.json) and the trained tensors (trained.safetensors)."""
    out_dir = Path(out_dir)
    return out_dir.with_name(f"{out_dir.name}.training")


def _shares(
    checkpoint: Checkpoint, blocks: Blocks, placement: Placement, held_out_blocks: int, schedule: Schedule, **_
):
    """Of a step, or of a look at what is held back."""
    together = max(held_out_blocks, schedule.batch_blocks)
    return micro_batches(together, blocks.seq_len, placement.device, checkpoint.config.hidden_size)


@over_gpus(_shares)
def recover(
    checkpoint: Checkpoint,
    keep: KeepSet,
    blocks: Blocks,
    placement: Placement,
    *,
    parts: Sequence[str],
    attention_rank: int | None,
    held_out_blocks: int,
    schedule: Schedule,
    objective: Objective,
    settings: Mapping,
    init: str | Path | None = None,
    out_dir: str | Path,
    on_look: Callable[[list[Look]], object] = lambda curve: None,
) -> dict:
    """Train, write the checkpoint to ``out_dir`` and return its manifest.

    The whole model is the teacher, through the same weights. The last ``held_out_blocks`` of ``blocks`` are not trained on:
    of all looks at them, the best one's tensors are written. settings: all that was asked for, as recorded. init:
    trained.safetensors of an earlier run with the same model, keep-set and parts, to begin with. on_look: called on the
    first rank after each look. A run that was killed goes on from its last look; one with other settings sets its state
    aside. Raises CheckpointError when out_dir exists and is not this run's.
    """
    require_writable_folder(Path(out_dir).parent, ParameterError)
    forward.check_request(checkpoint, [blocks.seq_len], objective.entropy_topk)
    leaves, before = (None, None) if init is None else _read_tensors(Path(init), checkpoint, keep)
    identity = _identity(checkpoint, keep, blocks, placement, settings, init)
    if (found := _finished(Path(out_dir), identity)) is not None:
        return found
    folder, is_first = training_folder(out_dir), ranks.current()[0] == 0
    state = _state(folder / STATE, identity, announce=is_first)
    trained = Trained(checkpoint, parts, attention_rank, placement.device, schedule.seed)
    if leaves is not None:
        trained.set(leaves)
    text, held_out = hold_back(blocks, held_out_blocks, checkpoint.tokenizer.eos_token_id)
    weights = Weights(checkpoint, placement, training=True)
    run = Recovery(weights, keep.mask, trained, text, held_out, schedule, objective)
    about = _about(blocks, settings, trained.parameters(keep.mask), checkpoint, before)

    def save(now: State) -> None:
        if is_first:
            now.save(folder / STATE, identity)
            _record(folder, settings, checkpoint, run, now, about)

    run.train(state, save, on_look if is_first else lambda curve: None)
    manifest = None
    if is_first:
        recovered = _record(folder, settings, checkpoint, run, state, about)
        _write_tensors(folder / TENSORS, trained, checkpoint, keep, recovered)
        recovered |= {"identity_sha256": _sha256(identity)}
        manifest = slicing.prune(checkpoint, keep, out_dir, new=dict(trained.final()), recovered=recovered)
        (folder / STATE).unlink(missing_ok=True)
    ranks.largest(0.0)  # the others return when everything is there
    return manifest or read_json(Path(out_dir) / slicing.MANIFEST, CheckpointError, "recover again")


def _identity(
    checkpoint: Checkpoint, keep: KeepSet, blocks: Blocks, placement: Placement, settings: Mapping, init
) -> dict:
    """All that the tensors depend on."""
    return {
        "settings": dict(settings),
        "init_sha256": init and sha256(Path(init)),
        "model_sha256": checkpoint.sha256,
        "keep_sha256": _sha256(keep.ids.tolist()),
        "input_sha256": blocks.input_sha256,
        "code_sha256": project.code_sha256(),
        "device": placement.device.type,
        "dtype": placement.precision.name,
        "ranks": ranks.current()[1],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _sha256(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _finished(out_dir: Path, identity: dict) -> dict | None:
    """The manifest of this very run, if it has finished before. Raises CheckpointError for anything else in its place."""
    if not out_dir.exists():
        return None
    if (out_dir / slicing.MANIFEST).is_file():
        manifest = slicing.read_manifest(Checkpoint(str(out_dir)))
        if (manifest.get("recovered") or {}).get("identity_sha256") == _sha256(identity):
            print(f"{out_dir} was written by an earlier run of the very same: nothing to do")
            return manifest
    raise CheckpointError(
        f"{out_dir} exists already, and not from this run; recovery never overwrites. Choose another out_dir or remove it."
    )


def _state(path: Path, identity: dict, announce: bool) -> State:
    if not path.is_file():
        return State()
    state, other = State.load(path)
    different = sorted(name for name in identity if other.get(name) != identity[name])
    if not different:
        if announce:
            print(f"going on from step {state.curve[-1].step}, where an earlier run of the same was stopped")
        return state
    ranks.largest(0.0)  # all have looked
    if announce:
        aside = path.with_name(f"{path.name}.old")
        path.replace(aside)
        print(f"{path} is of a run with other {', '.join(different)}: it is set aside as {aside.name}")
    return State()


def _about(blocks: Blocks, settings: Mapping, parameters: int, checkpoint: Checkpoint, before: dict | None) -> dict:
    """What a manifest says of the training, but for how far it went. before: the same of the run it began with."""
    text = {name: settings[name] for name in ("packs", "pack_files", "seq_len", "num_blocks", "held_out_blocks")}
    text |= {"pack": blocks.pack, "rows": blocks.rows, "rows_seen": blocks.rows_seen, "rows_sha256": blocks.rows_sha256}
    return {name: settings[name] for name in ("trained", "attention_rank")} | {
        "parameters": parameters,
        "parameters_share": parameters / slicing.num_parameters(checkpoint, checkpoint.num_experts),
        "init": before,
        "text": text,
        "settings_sha256": _sha256(dict(settings)),
    }


def _record(folder: Path, settings: Mapping, checkpoint: Checkpoint, run: Recovery, state: State, about: dict) -> dict:
    """Write recovery.json; returns its ``recovered``, which the manifest repeats."""
    last, best = state.curve[-1], state.best_look
    tokens = last.tokens + (about["init"] or {"tokens": 0})["tokens"]
    recovered = about | {"steps": last.step, "best_step": best.step, "tokens": tokens}
    content = {
        "schema": SCHEMA,
        "settings": dict(settings),
        "model_sha256": checkpoint.sha256,
        "held_out_ppl_whole": run.whole_ppl,
        "curve": [asdict(look) for look in state.curve],
        "best_step": best.step,
        "recovered": recovered,
    }
    write_json(folder / RECORD, content)
    return recovered


def _write_tensors(path: Path, trained: Trained, checkpoint: Checkpoint, keep: KeepSet, recovered: dict) -> None:
    from safetensors.torch import save_file

    tensors = {name: leaf.contiguous() for name, leaf in trained.stored().items()}
    metadata = {"model_sha256": checkpoint.sha256, "keep_sha256": _sha256(keep.ids.tolist())}
    metadata["recovered"] = json.dumps(recovered)
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def _read_tensors(path: Path, checkpoint: Checkpoint, keep: KeepSet) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors, and what was trained on what to get them."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ResultError(f"init: {path} does not exist; give trained.safetensors of an earlier run, or None")
    expected = {"model_sha256": checkpoint.sha256, "keep_sha256": _sha256(keep.ids.tolist())}
    try:
        with safe_open(path, framework="pt") as file:
            metadata, tensors = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ResultError(f"init: {path} cannot be read ({error}); copy or train it again") from error
    for name, value in expected.items():
        if metadata.get(name) != value:
            raise ResultError(
                f"init: {path} was trained with {name} {str(metadata.get(name))[:12]}, this run has {value[:12]}: start "
                "from tensors of the same model and the same keep-set"
            )
    return tensors, json.loads(metadata["recovered"])
