"""Everything a report shows, and its renderers."""
