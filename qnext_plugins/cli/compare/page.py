"""The report as one HTML page that needs nothing else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from qnext_plugins.cli.compare import plots
from qnext_plugins.cli.compare.report import Report
from qnext_plugins.cli.compare.terminal import error_in_words, heading, kinds_of, milliseconds, number, shown_versions


def render_page(report: Report) -> str:
    """The page's HTML."""
    environment = Environment(
        loader=PackageLoader("qnext_plugins.cli.compare", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = (number, milliseconds, repr, shown, shown_versions, error_in_words, heading)
    environment.filters |= {each.__name__: each for each in filters}
    delta_curves, performance = plots.delta_curves(report), plots.performance(report)
    return environment.get_template("page.html.jinja").render(
        report=report,
        kinds=kinds_of(report.pairs),
        measured=any(side.errors for side in report.sides),
        colours={side.name: plots.colour_of(report, side.name) for side in report.sides},
        # The plots are our own SVG, whose texts matplotlib has escaped.
        maps=[(pair, Markup(plots.agreement_map(report, pair))) for pair in report.pairs if pair.prompts],
        delta_curves=Markup(delta_curves) if delta_curves else None,
        performance=Markup(performance) if performance else None,
    )


def shown(text: str) -> str:
    """Text on one line, its line breaks still to be seen."""
    return text.replace("\n", "↵")


def write_page(report: Report, file: Path) -> None:
    """Write the page to ``file``."""
    file.write_text(render_page(report))
