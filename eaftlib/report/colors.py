"""One look per criterion, for all charts: Okabe and Ito's colours, which colour-blind readers can tell apart."""

from dataclasses import dataclass

ORANGE, SKY, GREEN, YELLOW = "#E69F00", "#56B4E9", "#009E73", "#F0E442"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#888888"

LEFT, RIGHT = BLUE, VERMILLION  # of two models that are compared
GOOD, BAD = GREEN, VERMILLION  # inside and outside of a limit
RECOVERED = YELLOW


@dataclass(frozen=True)
class Style:
    """Colour, dash of a line (Plotly's names) and symbol of a point (Plotly's names)."""

    color: str
    dash: str = "solid"
    symbol: str = "circle"


# A colour for what a criterion measures; the dash tells sums from means.
CRITERIA = {
    "eaft_reap": Style(VERMILLION),
    "eaft_reap_mean": Style(VERMILLION, "dash", "circle-open"),
    "reap_mass": Style(BLUE, symbol="square"),
    "reap": Style(SKY, "dash", "square-open"),
    "recon": Style(GREEN, symbol="diamond"),
    "ean": Style(PURPLE, symbol="triangle-up"),
    "ean_mean": Style(PURPLE, "dash", "triangle-up-open"),
    "msan": Style(PURPLE, "dot", "triangle-down"),
    "frequency": Style(ORANGE, symbol="triangle-left"),
    "gate_mass": Style(ORANGE, "dash", "triangle-right"),
    "random": Style(GREY, "dot", "x"),
}
_OTHERS = tuple(Style(color, "dashdot", "cross") for color in (SKY, ORANGE, GREEN, PURPLE, BLUE))


def of_criterion(criterion: str | None) -> Style:
    """The criterion's own, or by its name one of a few for those that the table does not have; None: criterion unknown."""
    if criterion in CRITERIA:
        return CRITERIA[criterion]
    return _OTHERS[sum(map(ord, criterion or "")) % len(_OTHERS)]
