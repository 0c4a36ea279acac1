"""The report as one HTML page that fetches nothing."""

import base64
import gzip
from importlib import resources

from .bars import SHAPES, bars
from .candidates import blocks_text
from .model import Report
from .page_data import page_data
from .page_figures import curve_captions, page_figures
from .tables import TRUST, rests_on, trust

_JSON = {"allow_nan": False, "separators": (",", ":"), "sort_keys": False}


def html(report: Report) -> str:
    """The same report gives the same bytes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("eaftlib.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.policies["json.dumps_kwargs"] = _JSON  # its filter escapes what could end a script
    return environment.get_template("report.html.jinja").render(
        report=report,
        shown=report.best or report.nearest,
        bars=bars,
        shapes=SHAPES,
        data=page_data(report),
        curves=curve_captions(report),
        figures=page_figures(report),
        blocks_text=blocks_text,
        rests_on=rests_on,
        trust=trust(report),
        trust_columns=TRUST,
        missing_length=[c.label for c in report.candidates if c.verdict.missing],
        style=Markup(_template("report.css")),
        script=Markup(_template("report.js")),
        plotly=_plotly(),
    )


def _template(name: str) -> str:
    return (resources.files("eaftlib.report") / "templates" / name).read_text()


def _plotly() -> str:
    """Plotly's own script, base64 of gzip: a third of its size, and unpacked only when a chart comes into view."""
    script = (resources.files("plotly") / "package_data" / "plotly.min.js").read_bytes()
    return base64.b64encode(gzip.compress(script, compresslevel=9, mtime=0)).decode()
