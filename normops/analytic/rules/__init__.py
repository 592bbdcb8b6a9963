"""The rules by which torch functions pass means and variances on. Importing this package fills `moments.RULES`."""

from normops.analytic.rules import functions, linear, norms

__all__ = ["functions", "linear", "norms"]
