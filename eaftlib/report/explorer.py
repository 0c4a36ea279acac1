"""Sliders over a stored trace, for notebooks: keep-set, overlap, mass and predicted loss move with them."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ParameterError
from ..files import write_atomically
from ..pruning.criteria import ALIGNMENTS, RANDOM, RECON
from ..pruning.explore import Choice, Explorer, Settings
from . import charts, figures

if TYPE_CHECKING:
    import ipywidgets


class Panel:
    """Controls and one figure that follows them. ``figure`` is what is shown now.

    The figure is a plain output that is replaced at each move, not a widget, and comes with a picture at first: so a notebook
    that ran without a front end shows that, in an export too.
    """

    def __init__(self, explorer: Explorer, *, ranking: str, keep_n: int, criterion: str, out_dir: str):
        """ranking: path of the ranking.json that is explored; out_dir: of the parameters written, and of what they lead to.

        Raises ParameterError for a count or a criterion that is not to be had.
        """
        counts = explorer.counts()
        if keep_n not in counts:
            raise ParameterError(f"keep_n: found {keep_n}, expected one of {counts}")
        self.explorer, self._ranking, self._out_dir, self._display = explorer, ranking, Path(out_dir), None
        explorer.choose(
            Settings.of(explorer.ranking), criterion, keep_n
        )  # names a criterion it lacks; a widget would not
        self.controls = _controls(explorer, keep_n, criterion)
        self.figure = charts.keep_set(*self._shown())
        for control in self.controls.values():
            control.observe(self._moved, "value")

    @property
    def settings(self) -> Settings:
        return Settings(**{name: self.controls[name].value for name in Settings.__dataclass_fields__})

    @property
    def choice(self) -> Choice:
        return self._choose(self.controls["criterion"].value)

    def show(self) -> None:
        """Controls, and below them the figure."""
        import ipywidgets
        from IPython.display import display

        rows = [list(self.controls.values())[start : start + 4] for start in (0, 4)]
        display(ipywidgets.VBox([ipywidgets.HBox(row) for row in rows]))
        # A Plotly figure that displays itself cannot be updated; its bundle can.
        picture = figures.keep_set(*self._shown())._repr_png_()
        bundle = {"image/png": b64encode(picture).decode()} | self.figure._repr_mimebundle_()
        self._display = display(bundle, raw=True, display_id=True)

    def parameters(self) -> dict[str, dict]:
        """Parameters by notebook: 03_evaluate of the keep-set shown, and 01_rank where its ranking does not exist yet."""
        provenance, criterion = self.explorer.ranking["provenance"], self.controls["criterion"].value
        unchanged = self.settings == Settings.of(self.explorer.ranking) or criterion in (RANDOM, RECON)
        there = unchanged and criterion in self.explorer.ranking["criteria"]
        keep_n = self.controls["keep_n"].value
        ranking = self._ranking if there else str(self._out_dir / "rank" / "ranking.json")
        chosen = {"label": f"{criterion.replace('_', '-')}-{keep_n}", "ranking": ranking, "criterion": criterion}
        evaluate = {"model": provenance["model_id"]} | {name: provenance[name] for name in ("packs", "pack_files")}
        evaluate |= {"rows": "eval" if provenance["rows"] == "calib" else "all", "label": None}
        evaluate |= {"keep_set": [{"label": "base"}, chosen | {"keep_n": keep_n}]}
        evaluate |= {"out_dir": str(self._out_dir / "evaluate")}
        found = {"03_evaluate": evaluate}
        return found if there else {"01_rank": self._rank_parameters(criterion), **found}

    def yaml(self) -> str:
        """The same as text, one document per notebook."""
        return "---\n".join(f"# {notebook}\n{_dumped(values)}" for notebook, values in self.parameters().items())

    def write(self) -> list[Path]:
        """A file of parameters for each notebook, rank.yaml and evaluate.yaml; returns their paths."""
        texts = {self._out_dir / f"{book[3:]}.yaml": _dumped(values) for book, values in self.parameters().items()}
        for path, text in texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda temporary, text=text: Path(temporary).write_text(text))
        return list(texts)

    def write_button(self) -> ipywidgets.VBox:
        """A button that writes the parameters of what is shown when it is pressed, and says where."""
        import ipywidgets

        button, said = ipywidgets.Button(description="Write parameters", icon="save"), ipywidgets.Label()

        def pressed(_) -> None:
            said.value = "wrote " + ", ".join(map(str, self.write()))

        button.on_click(pressed)
        return ipywidgets.VBox([button, said])

    def _rank_parameters(self, criterion: str) -> dict:
        provenance = self.explorer.ranking["provenance"]
        names = ("packs", "pack_files", "rows", "seq_len", "num_blocks", "entropy_topk", "seed")
        values = {"model": provenance["model_id"]} | {name: provenance[name] for name in names}
        return values | {"criteria": [criterion]} | vars(self.settings) | {"out_dir": str(self._out_dir / "rank")}

    def _choose(self, criterion: str) -> Choice:
        return self.explorer.choose(self.settings, criterion, self.controls["keep_n"].value)

    def _shown(self) -> tuple[Choice, str, Choice, str]:
        criterion, other = (self.controls[name].value for name in ("criterion", "compared_with"))
        return self._choose(criterion), criterion, self._choose(other), other

    def _moved(self, _) -> None:
        self.figure = charts.keep_set(*self._shown())
        if self._display is not None:
            self._display.update(self.figure._repr_mimebundle_(), raw=True)


def _controls(explorer: Explorer, keep_n: int, criterion: str) -> dict[str, ipywidgets.Widget]:
    """By name; values at first are those that the ranking was made with."""
    import ipywidgets

    found = Settings.of(explorer.ranking)
    other = next((name for name in explorer.ranking["criteria"] if name != criterion), criterion)
    wide = {"style": {"description_width": "7em"}, "layout": {"width": "22em"}}

    def weight(name: str) -> ipywidgets.FloatSlider:
        value = getattr(found, name)
        limits = {"min": min(-4.0, value), "max": max(4.0, value), "step": 0.05}
        return ipywidgets.FloatSlider(value=value, description=name.replace("_", " "), **limits, **wide)

    def dropdown(options, value, description: str) -> ipywidgets.Dropdown:
        return ipywidgets.Dropdown(options=options, value=value, description=description, **wide)

    return {
        "criterion": dropdown(explorer.criteria, criterion, "criterion"),
        "keep_n": ipywidgets.SelectionSlider(options=explorer.counts(), value=keep_n, description="keep", **wide),
        "compared_with": dropdown(explorer.criteria, other, "compared with"),
        "align": dropdown(ALIGNMENTS, found.align, "align"),
        **{name: weight(name) for name in ("w_good", "w_uncertain", "w_conflict")},
        "cc_quantile": ipywidgets.FloatSlider(
            value=found.cc_quantile,
            description="cc_quantile",
            min=0.005,
            max=0.995,
            step=0.005,
            readout_format=".3f",
            **wide,
        ),
    }


def _dumped(values: dict) -> str:
    import yaml

    return yaml.safe_dump(values, sort_keys=False, width=120)
