"""A picture as PNG, by Pillow, which brings a font too: with zlib a PNG is a few lines, but its labels need
one."""

from __future__ import annotations

from io import BytesIO

from tierblk.cli.map_picture import Picture, Rect
from tierblk.cli.map_svg import LIGHT
from tierblk.errors import TierblkError

SCALE = 2  # pixels a unit


def render(picture: Picture) -> bytes:
    """The file, for bright pages. TierblkError without Pillow."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise TierblkError(
            "pictures as PNG need Pillow, which is not installed", "pip install 'tierblk[png]', or use --svg"
        ) from None
    image = Image.new("RGB", (round(picture.width * SCALE), round(picture.height * SCALE)), LIGHT["page"])
    pen = ImageDraw.Draw(image, "RGBA")
    for shape in picture.shapes:
        colour = f"{LIGHT[shape.colour]}{round(255 * shape.opacity):02x}"
        for rect in shape.rects:
            pen.rectangle(_corners(rect), fill=colour)
    for words in picture.words:
        font = ImageFont.load_default(size=words.size * SCALE)
        pen.text(
            (words.x * SCALE, words.y * SCALE),
            words.text,
            font=font,
            anchor="rs" if words.right else "ls",
            fill=LIGHT[words.colour],
            stroke_width=0.4 * SCALE if words.bold else 0,
        )
    file = BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _corners(rect: Rect) -> tuple[float, float, float, float]:
    """Pillow's rectangles have their last pixel too."""
    left, top = round(rect.x * SCALE), round(rect.y * SCALE)
    right, bottom = round((rect.x + rect.width) * SCALE), round((rect.y + rect.height) * SCALE)
    return left, top, max(left, right - 1), max(top, bottom - 1)
