"""The report as one HTML page that fetches nothing."""

from . import figures
from .model import Report
from .tables import SCORES, VERDICTS_AND_SIZES


def html(report: Report) -> str:
    """The same report gives the same bytes."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("eaftlib.report", "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    tables = sorted(report.tables.items(), key=lambda table: table[0][0] != report.primary_pack)
    return environment.get_template("report.html.jinja").render(
        report=report,
        verdict_columns=VERDICTS_AND_SIZES,
        score_columns=SCORES,
        tables=tables,
        curve=figures.keep_curve(report.curve).svg() if report.curve else "",
        landscapes=[figures.landscape(part.model, part.title).svg() for part in report.landscapes],
    )
