"""Photographs with their classes beside them, as one picture."""

from ..pictures import pillow, read

PANEL, TEXT, MARGIN = 320, 400, 16  # the photograph's edge, the width of what is beside it, the space around both
INK, FAINT, BAR = "#202124", "#70757a", "#c6dafc"


def annotated(results):
    """A PIL image with a row for each (path, guesses)."""
    Image, _ = pillow()
    from PIL import ImageDraw, ImageFont, ImageOps

    title, text = ImageFont.load_default(18), ImageFont.load_default(15)
    line = 40
    height = max(PANEL, *(30 + line * len(guesses) for _, guesses in results)) + 2 * MARGIN
    sheet = Image.new("RGB", (PANEL + TEXT + 3 * MARGIN, height * len(results)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (path, guesses) in enumerate(results):
        top, left = row * height + MARGIN, PANEL + 2 * MARGIN
        photograph = ImageOps.contain(read(path, PANEL), (PANEL, PANEL))
        sheet.paste(photograph, (MARGIN + (PANEL - photograph.width) // 2, top))
        draw.text((left, top), fitting(path.rpartition("/")[2], title, TEXT), INK, title)
        for rank, guess in enumerate(guesses):
            y = top + 30 + line * rank
            draw.rectangle((left, y, left + max(round(guess.probability * TEXT), 1), y + line - 8), BAR)
            percent = f"{guess.probability:.1%}"
            room = TEXT - 24 - draw.textlength(percent, text)
            draw.text((left + 8, y + 7), fitting(guess.name, text, room), INK, text)
            draw.text((left + TEXT - 8, y + 7), percent, FAINT, text, anchor="ra")
    return sheet


def fitting(words, font, width):
    """As much of the words as there is room for."""
    words = words.encode("utf-8", "replace").decode()  # a file's name need not be text
    if font.getlength(words) <= width:
        return words
    while words and font.getlength(words + "...") > width:
        words = words[:-1]
    return words + "..."
