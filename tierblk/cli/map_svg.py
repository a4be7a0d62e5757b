"""A picture as SVG: one file that needs nothing else, with texts as texts, for bright and dark pages."""

from __future__ import annotations

from xml.sax.saxutils import escape

from tierblk.cli.map_picture import Picture, Rect, Shape, Words

LIGHT = {
    "page": "#ffffff",
    "text": "#212529",
    "faint": "#5c636a",
    "dirty": "#e8590c",
    "volume": "#7950f2",
    "base": "#228be6",
    "zero": "#ced4da",
    "stored": "#d0bfff",
    "lost": "#c2255c",
    "absent": "#f1f3f5",
    "used": "#f08c00",
    "part0": "#2b8a3e",
    "part1": "#0b7285",
    "part2": "#862e9c",
    "part3": "#846358",
}
DARK = {
    "page": "#16181c",
    "text": "#e9ecef",
    "faint": "#a5abb2",
    "dirty": "#fd7e14",
    "volume": "#9775fa",
    "base": "#339af0",
    "zero": "#5c636a",
    "stored": "#4b3f86",
    "lost": "#f06595",
    "absent": "#272b30",
    "used": "#fcc419",
    "part0": "#51cf66",
    "part1": "#3bc9db",
    "part2": "#da77f2",
    "part3": "#c0a392",
}


def render(picture: Picture) -> bytes:
    """The file."""
    size = f"{_number(picture.width)} {_number(picture.height)}"
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" width="{_number(picture.width)}" '
        f'height="{_number(picture.height)}" role="img" aria-labelledby="title desc">',
        f'<title id="title">{escape(picture.title)}</title>',
        f'<desc id="desc">{escape(picture.description)}</desc>',
        "<style>",
        "text { font-family: system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif; white-space: pre }",
        *_rules(LIGHT),
        "@media (prefers-color-scheme: dark) {",
        *_rules(DARK),
        "}",
        "</style>",
        f'<rect class="page" width="{_number(picture.width)}" height="{_number(picture.height)}" rx="8"/>',
        *map(_path, picture.shapes),
        *map(_text, picture.words),
        "</svg>",
    ]
    return ("\n".join(lines) + "\n").encode()


def _rules(palette: dict[str, str]) -> list[str]:
    return [f".{name} {{ fill: {colour} }}" for name, colour in palette.items()]


def _number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _path(shape: Shape) -> str:
    """All rectangles of a shape as one element."""
    opacity = f' fill-opacity="{_number(shape.opacity)}"' if shape.opacity < 1 else ""
    return f'<path class="{shape.colour}"{opacity} d="{"".join(map(_rectangle, shape.rects))}"/>'


def _rectangle(rect: Rect) -> str:
    width, height = _number(rect.width), _number(rect.height)
    return f"M{_number(rect.x)} {_number(rect.y)}h{width}v{height}h-{width}z"


def _text(words: Words) -> str:
    anchor = ' text-anchor="end"' if words.right else ""
    weight = ' font-weight="600"' if words.bold else ""
    place = f'x="{_number(words.x)}" y="{_number(words.y)}" font-size="{_number(words.size)}"'
    return f'<text class="{words.colour}" {place}{anchor}{weight}>{escape(words.text)}</text>'
