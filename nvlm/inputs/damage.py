"""What a picture or a video raises is its own `UserError`, whoever reads it, and here alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image

from nvlm.inputs.picture_budget import too_many_pixels
from nvlm.program.errors import UserError, cut


@contextmanager
def as_its_own_error(where: str, what_is_wrong: str, remedy: str) -> Iterator[None]:
    """Turns whatever decoding, turning and scaling raise into one sentence about `where`.

    Decoders raise whatever a damaged file makes them raise, so no kind of exception is left out.
    """
    try:
        yield
    except UserError:
        raise
    except Image.DecompressionBombError:  # a picture within the file
        raise too_many_pixels(where) from None
    except MemoryError:
        raise UserError(
            f"{where} takes more memory to read than there is; give a smaller one"
        ) from None
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)
        lines = reason.splitlines() or [""]
        reason = cut(lines[0].split("<_io.")[0].strip()) or type(error).__name__
        raise UserError(f"{where} {what_is_wrong} ({reason}); {remedy}") from None
