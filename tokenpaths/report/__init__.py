"""Tables, JSON, pages and figures."""

from tokenpaths.report.tradeoff import Point as Point
from tokenpaths.report.tradeoff import frontier as frontier
