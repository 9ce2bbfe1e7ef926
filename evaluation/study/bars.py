"""The shares of the four levels as an SVG: one bar for each method and dimension."""

from xml.sax.saxutils import escape

from engine.errors import printable
from evaluation.study.votes import DIMENSIONS, EXCELLENT, LEVELS

COLORS = ["#0072B2", "#7CC4EE", "#F2D974", "#D55E00"]  # Okabe and Ito's: colour-blind people can tell them apart too
LEFT, WIDTH = 190, 520  # pixels: where the bars begin, and the length of a whole bar


MARK = b"<title>Ratings, percent</title>"


def safe(words):
    """Words for an SVG, escaped. XML forbids most control characters, so these are written as visible text."""
    return escape(printable(words))


def text(x, y, words, more=""):
    return f'<text x="{x:.1f}" y="{y}" {more}>{safe(words)}</text>'


def legend():
    """SVG elements: the names of the four levels beside their colours."""
    parts = []
    for level, (name, color) in enumerate(zip(LEVELS, COLORS, strict=True)):
        x = LEFT + 105 * level
        parts.append(f'<rect x="{x}" y="14" width="16" height="16" fill="{color}"/>')
        parts.append(text(x + 22, 27, name))
    parts.append(text(LEFT + WIDTH, 27, "% of ratings", 'text-anchor="end"'))
    return parts


def bar(method, rate, y):
    """SVG elements: one method's name and its four shares, y pixels from the top."""
    short = method if len(method) <= 24 else method[:23] + "…"
    parts = [text(LEFT - 10, y + 15, short, 'text-anchor="end"')]
    if not rate.n:
        parts.append(text(LEFT, y + 15, "no ratings", 'fill="#666"'))
    x = LEFT
    for level, count in enumerate(rate.counts):
        share = count / rate.n if rate.n else 0
        width = WIDTH * share
        told = safe(f"{method}: {LEVELS[level]} {count} of {rate.n}")
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{COLORS[level]}">'
                     f"<title>{told}</title></rect>")
        if width > 26:  # in a narrower part the number does not fit
            ink = "#fff" if level == EXCELLENT else "#000"
            parts.append(text(x + width / 2, y + 15, f"{100 * share:.0f}",
                              f'text-anchor="middle" fill="{ink}"'))
        x += width
    return parts


def bars(methods):
    """{method: {dimension: Rate}} -> the SVG's text."""
    parts = legend()
    y = 46
    for dimension, title in {"overall": "Overall", **DIMENSIONS}.items():
        parts.append(text(LEFT, y + 14, title, 'font-weight="bold"'))
        y += 22
        for method, rates in methods.items():
            parts += bar(method, rates[dimension], y)
            y += 26
        y += 14
    width = LEFT + WIDTH + 30
    size = f'width="{width}" height="{y}" viewBox="0 0 {width} {y}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="14">\n'
            f'{MARK.decode()}\n<rect width="100%" height="100%" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")
