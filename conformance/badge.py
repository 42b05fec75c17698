"""A report as a badge: how many checks pass, in a picture for a README."""

from html import escape

from refspan.conformance.report import Report

GREEN, YELLOW, RED, GREY = "#2c7a34", "#8a6d00", "#b3261e", "#5f6368"
LETTER = 6.6
"""Width that a letter is given."""


def badge(report: Report) -> bytes:
    """An SVG image. What is not offered stays in the whole that passes are counted against."""
    said = f"{report.count('passed')}/{report.planned}"
    colour = GREEN if report.conforms else RED
    if known := report.known_failures():
        said, colour = f"{said}, {known}", YELLOW if report.as_expected else RED
    if failed := report.count("failed"):
        said = f"{said}, {failed} failed"
    if not report.complete:
        said, colour = f"{said}, incomplete", GREY
    left, right = (round(len(text) * LETTER) + 12 for text in ("refspan", said))
    title = escape(f"refspan: {said}")
    size = f'width="{left + right}" height="20"'
    return f"""<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">
<title>{title}</title>
<rect width="{left}" height="20" fill="#444"/><rect x="{left}" width="{right}" height="20" fill="{colour}"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11" text-anchor="middle">
<text x="{left / 2:g}" y="14">refspan</text><text x="{left + right / 2:g}" y="14">{escape(said)}</text>
</g>
</svg>
""".encode()
