"""Typed parameters of the notebooks. An unknown name, a wrong type or an impossible value is an error before any work."""

import ast
import difflib
import itertools
import re
import reprlib
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, field_validator, model_validator

from . import notebooks
from .errors import ParameterError
from .files import FILE_NAME, HUB_NAME, require_file
from .pruning.criteria import CRITERIA, RANDOM, RECON

MARK = "# Parameters"  # first line of a cell of parameters; papermill's injected cell begins with it too

BASE = "base"  # label of the whole model
MOST_VALUES = 100_000  # in a file of parameters

Positive = Annotated[int, Field(gt=0, lt=2**31)]
Share = Annotated[float, Field(gt=0, lt=1)]
Rows = Literal["all", "calib", "eval"]
Trained = Literal["routers", "expert_biases", "norms", "attention", "lm_head"]
Label = Annotated[str, Field(pattern=f"^{FILE_NAME}$")]  # it names files
LossWeight = Annotated[FiniteFloat, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class Parameters(BaseModel):
    """Base of one notebook's parameters; field names are the notebook's fixed parameter names."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())

    @classmethod
    def check(cls, values: dict[str, Any]) -> Self:
        """Raises ParameterError that names the first bad parameter, what was found and what was expected."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"])) or "parameters"
            if first["type"] == "extra_forbidden":
                close = difflib.get_close_matches(name.split(".")[-1], cls.model_fields, 1)
                hint = f" Did you mean {close[0]!r}?" if close else ""
                raise ParameterError(
                    f"unknown parameter {name!r}.{hint} Known: {', '.join(cls.model_fields)}"
                ) from None
            found = "" if first["type"] in ("missing", "value_error") else f", found {reprlib.repr(first['input'])}"
            raise ParameterError(f"{name}: {first['msg'].removeprefix('Value error, ')}{found}") from None

    @classmethod
    def from_notebook(cls, shell) -> Self:
        """Parameters of the running notebook; ``shell`` is ``get_ipython()``.

        Values come from its namespace. Every name set in the latest cell of parameters counts, so that a misspelt one
        is found although the notebook defines a default under the right name.
        """
        namespace, executed = shell.user_ns, shell.user_ns["In"]
        cells = [cell for cell in executed if cell.lstrip().startswith(MARK)]
        if not cells:
            raise ParameterError(
                f"parameters: no cell that was run begins with the line {MARK!r}, so that a misspelt name would not be seen. "
                "Let the cell that sets them begin with it, and run it."
            )
        names = set(cls.model_fields) | _assigned_names(cells[-1])
        return cls.check({name: namespace[name] for name in names if name in namespace})


class Rank(Parameters):
    """01_rank"""

    model: str
    packs: str
    pack_files: list[str] | None
    rows: Rows
    seq_len: Positive
    num_blocks: Positive
    criteria: Annotated[list[Literal[*CRITERIA, RECON, RANDOM]], Field(min_length=1)]
    entropy_topk: Annotated[int, Field(ge=2)]
    cc_quantile: Share
    w_good: FiniteFloat
    w_uncertain: FiniteFloat
    w_conflict: FiniteFloat
    align: Literal["predictor", "token"]
    recon_tokens: Positive
    device: str
    dtype: str
    max_gpu_memory: Annotated[FiniteFloat, Field(gt=0)] | None
    seed: Seed
    out_dir: str

    @model_validator(mode="after")
    def _some_tokens_count(self) -> Self:
        if self.w_good == self.w_uncertain == self.w_conflict == 0:
            raise ValueError(
                "w_good, w_uncertain, w_conflict: all are 0, so that no token counts; give one another weight"
            )
        return self


class KeepSetParameters(Parameters):
    """How the experts that stay are chosen."""

    ranking: str
    criterion: Annotated[str, Field(min_length=1)]
    keep_frac: float | None = None
    keep_n: int | None = None
    multiple_of: int = 4
    core_top_m: int = 0
    keep_super: bool = False

    @property
    def keep_set(self) -> dict[str, Any]:
        """Arguments of keepsets.from_ranking."""
        return self.model_dump(include=set(KeepSetParameters.model_fields))


class CheckpointParameters(KeepSetParameters):
    """Of a checkpoint that is written, and sent to the hub where ``publish_to`` is given."""

    model: str
    publish_to: str | None
    out_dir: str

    @field_validator("publish_to")
    @classmethod
    def _name_on_the_hub(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(HUB_NAME, name):
            raise ValueError(f"found {name!r}, expected owner/name of a repository on the hub, or None")
        return name


class Prune(CheckpointParameters):
    """02_prune"""


class LabelledKeepSet(KeepSetParameters):
    """One entry of a list of keep-sets; only a label: the whole model, scored in the same pass."""

    label: Label
    ranking: str | None = None
    criterion: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _whole_or_complete(self) -> Self:
        given = {name for name in self.model_fields_set - {"label"} if getattr(self, name) is not None}
        if given and not {"ranking", "criterion"} <= given:
            raise ValueError(f"keep_set {self.label!r} needs ranking and criterion; it has {sorted(given)}")
        return self

    @property
    def keep_set(self) -> dict[str, Any] | None:
        return None if self.ranking is None else self.model_dump(exclude={"label"})


class Evaluate(Parameters):
    """03_evaluate"""

    model: str
    label: Label | None
    keep_set: KeepSetParameters | Annotated[list[LabelledKeepSet], Field(min_length=1)] | None
    packs: str
    pack_files: list[str] | None
    only: Annotated[list[str], Field(min_length=1)] | None
    rows: Rows
    seq_lens: Annotated[list[Positive], Field(min_length=1)]
    num_blocks: int | list[int]
    entropy_topk: Annotated[int, Field(ge=2)]
    cc_quantile: Share
    device: str
    dtype: str
    max_gpu_memory: Annotated[FiniteFloat, Field(gt=0)] | None
    out_dir: str

    @field_validator("num_blocks", mode="plain")
    @classmethod
    def _one_number_or_a_list(cls, value: Any) -> Any:
        numbers = value if isinstance(value, list) else [value]
        if not numbers or any(type(n) is not int or not 0 < n < 2**31 for n in numbers):
            raise ValueError(
                f"found {reprlib.repr(value)}, expected a whole number above 0 and below 2**31, or a list of them, one for "
                "each of seq_lens"
            )
        return value

    @field_validator("keep_set", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        if isinstance(value, list):
            return [LabelledKeepSet.check(entry) if isinstance(entry, dict) else entry for entry in value]
        return KeepSetParameters.check(value) if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _every_result_has_one_label(self) -> Self:
        if isinstance(self.keep_set, list):
            if self.label is not None:
                raise ValueError(
                    f"label: {self.label!r} names nothing beside a list, whose keep-sets have their own; set None"
                )
            if len(self.keep_sets) < len(self.keep_set):
                raise ValueError("keep_set: two entries share a label")
        elif self.keep_set is not None and self.label is None:
            raise ValueError("label: the result of a keep-set needs a name; give one")
        return self

    @field_validator("seq_lens")
    @classmethod
    def _each_length_once(cls, seq_lens: list[int]) -> list[int]:
        return _each_once(seq_lens)

    @model_validator(mode="after")
    def _blocks_of_each_length(self) -> Self:
        if isinstance(self.num_blocks, list) and len(self.num_blocks) != len(self.seq_lens):
            raise ValueError(
                f"num_blocks: found {len(self.num_blocks)} numbers for {len(self.seq_lens)} seq_lens; give one, or one for each"
            )
        return self

    @property
    def blocks_by_length(self) -> int | dict[str, int]:
        """num_blocks; by sequence length where a list says so, in the form that a result records."""
        if isinstance(self.num_blocks, int):
            return self.num_blocks
        return dict(zip(map(str, self.seq_lens), self.num_blocks, strict=True))

    @property
    def keep_sets(self) -> dict[str, dict[str, Any] | None]:
        """Label -> arguments of keepsets.from_ranking, or None for the whole model, which is ``base`` if nothing is said."""
        if isinstance(self.keep_set, list):
            return {entry.label: entry.keep_set for entry in self.keep_set}
        return {self.label or BASE: self.keep_set and self.keep_set.keep_set}


class Recover(CheckpointParameters):
    """05_recover"""

    trained: Annotated[list[Trained], Field(min_length=1)]
    attention_rank: Positive | None
    packs: str
    pack_files: list[str] | None
    rows: Rows
    seq_len: Positive
    num_blocks: Positive
    held_out_blocks: Positive
    batch_blocks: Positive
    steps: Annotated[int, Field(ge=0)]
    learning_rate: Annotated[FiniteFloat, Field(gt=0)]
    check_every: Positive
    patience: Positive
    other_weight: Annotated[float, Field(ge=0, le=1)]
    entropy_topk: Annotated[int, Field(ge=2)]
    cc_quantile: Share
    w_good: LossWeight
    w_uncertain: LossWeight
    w_conflict: LossWeight
    seed: Seed
    init: str | None
    device: str
    dtype: str
    max_gpu_memory: Annotated[FiniteFloat, Field(gt=0)] | None

    @property
    def settings(self) -> dict[str, Any]:
        """What was asked for, but for where it runs and where it goes."""
        return self.model_dump(exclude={"device", "dtype", "max_gpu_memory", "publish_to", "out_dir"})

    @field_validator("trained")
    @classmethod
    def _each_part_once(cls, trained: list[str]) -> list[str]:
        return _each_once(trained)

    @model_validator(mode="after")
    def _rank_of_trained_attention(self) -> Self:
        if self.attention_rank is not None and "attention" not in self.trained:
            raise ValueError(
                f"attention_rank: found {self.attention_rank}, but trained is {self.trained}; set None, or train attention"
            )
        return self

    @model_validator(mode="after")
    def _blocks_for_training(self) -> Self:
        training = self.num_blocks - self.held_out_blocks
        if training <= 0:
            raise ValueError(
                f"held_out_blocks: found {self.held_out_blocks}, expected fewer than num_blocks ({self.num_blocks}): no block "
                "would be left to train on"
            )
        if self.batch_blocks > training:
            raise ValueError(
                f"batch_blocks: found {self.batch_blocks}, expected at most {training}, the blocks to train on "
                f"(num_blocks {self.num_blocks} less held_out_blocks {self.held_out_blocks})"
            )
        return self

    @model_validator(mode="after")
    def _some_tokens_count(self) -> Self:
        if self.w_good == self.w_uncertain == self.w_conflict == 0:
            raise ValueError("w_good, w_uncertain, w_conflict: all are 0, so that no token counts; let one be above 0")
        return self


class Report(Parameters):
    """04_report"""

    results: Annotated[list[str], Field(min_length=1)]
    baseline: str
    gates: str
    rankings: list[str] | None
    conflict_texts: bool
    out_dir: str


class Explore(Parameters):
    """00_explore"""

    ranking: str
    criterion: str
    keep_n: Positive
    out_dir: str


NOTEBOOKS = {
    "00_explore": Explore,
    "01_rank": Rank,
    "02_prune": Prune,
    "03_evaluate": Evaluate,
    "04_report": Report,
    "05_recover": Recover,
}


def of_notebook(notebook: str, values: dict[str, Any]) -> Parameters:
    """A notebook's parameters with some values set. Raises ParameterError for the first that is wrong or unknown."""
    return NOTEBOOKS[notebook].check(notebooks.defaults(notebook) | values)


def read_file(path: Path) -> dict[str, Any]:
    """Names and values of a file of parameters. Raises ParameterError when it is none, or gives a name twice.

    Names are not looked at. papermill writes them into a cell as they are, so whoever hands them on checks them first.
    """
    require_file(path, ParameterError, "start in the repository's root, and give a file of params/")
    values = _yaml(path)
    if not isinstance(values, dict):
        raise ParameterError(f"{path}: expected names and values, found {type(values).__name__}")
    if odd := [name for name in values if not isinstance(name, str)]:
        raise ParameterError(f"{path}: found {odd[0]!r} for a name, expected a word")
    return values


def _yaml(path: Path) -> object:
    """Plain values only: a file with tags, or one that unfolds to more than it seems, holds no parameters."""
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent, index):
            event = self.peek_event()
            if getattr(event, "tag", None) not in (None, "!"):  # some make PyYAML stumble
                raise yaml.MarkedYAMLError(
                    problem=f"found the tag {event.tag!r}, expected none", problem_mark=event.start_mark
                )
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor):  # before a merge (<<) is resolved, whose names may be given anew
            node = super().compose_mapping_node(anchor)
            times = Counter(name.value for name, _ in node.value if isinstance(name, yaml.ScalarNode))
            if twice := next((name for name, n in times.items() if n > 1), None):
                raise yaml.MarkedYAMLError(problem=f"{twice!r} is given twice", problem_mark=node.start_mark)
            return node

        def get_single_node(self):
            node = super().get_single_node()
            if node is not None and _unfolded(node, {}) > MOST_VALUES:
                raise yaml.MarkedYAMLError(problem=f"its aliases unfold to more than {MOST_VALUES} values")
            return node

        def construct_yaml_int(self, node):
            value = super().construct_yaml_int(node)
            str(value)  # 0x... may have more digits than Python writes: a ValueError, like that of one it cannot read
            return value

        def construct_yaml_str(self, node):
            value = super().construct_yaml_str(node)
            value.encode()  # half a surrogate pair: a ValueError
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_yaml_int)
    Loader.add_constructor("tag:yaml.org,2002:str", Loader.construct_yaml_str)
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
    except RecursionError:
        raise ParameterError(f"{path} is nested too deeply for parameters") from None
    except OSError as cause:
        raise ParameterError(f"{path} cannot be read: {cause}") from cause
    except (yaml.YAMLError, ValueError) as cause:
        # The latter: no UTF-8, a month of 13, an integer of more digits than Python converts
        raise ParameterError(f"{path} is not YAML: {cause}") from cause


def _unfolded(node, known: dict[int, float]) -> float:
    """How many values a YAML node stands for, those behind aliases counted each time; without end where it is in itself."""
    if id(node) not in known:
        known[id(node)] = float("inf")
        parts = {"scalar": lambda: [], "sequence": lambda: node.value, "mapping": lambda: itertools.chain(*node.value)}
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in parts[node.id]())
    return known[id(node)]


def check_file(notebook: str, path: Path) -> None:
    """Raises ParameterError, which names the file, unless it holds parameters of the notebook."""
    values = read_file(path)
    try:
        of_notebook(notebook, values)
    except ParameterError as error:
        raise ParameterError(f"{path}: {error}") from None


def _each_once(values: list) -> list:
    if twice := next((value for value in values if values.count(value) > 1), None):
        raise ValueError(f"{twice!r} is given twice in {values}; expected each once")
    return values


def _assigned_names(source: str) -> set[str]:
    tree = ast.parse(source)
    targets = [t for node in tree.body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in tree.body if isinstance(node, ast.AnnAssign)]
    return {t.id for t in targets if isinstance(t, ast.Name)}
