"""Everything a report shows, and its renderers. In notebooks ``compare("a.json", "b.json")`` shows two results side by side."""


def __getattr__(name: str):
    if name == "compare":  # loads Plotly, which the report's model and tables do not need
        from .pair import compare

        return compare
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
