"""Pages of a PDF as pictures, by pypdfium2 (requirements/pictures.txt), where it is installed."""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from types import ModuleType

from PIL import Image

from nvlm.inputs.picture import PageHeader, Picture
from nvlm.program.errors import UserError

LONG_SIDE = 2000
"""Pixels: a page of A4 then has 170 dots an inch, more than 12 tiles show of it."""

_DRAWING_BYTES = 3 * 4 * LONG_SIDE * LONG_SIDE
"""PDFium's bitmap and two copies of it. What a page's own pictures take is not known before."""

_PDFIUM = threading.Lock()
"""PDFium may be called by one thread at a time."""


class PdfPages:
    """An opened PDF; a context that closes it. Filled-in form fields are drawn, scripts not run."""

    def __init__(self, source: Path | bytes, where: str) -> None:
        pdfium = _pdfium(where)
        self._where = where
        self._index = 0
        with _PDFIUM:
            try:
                self._document = pdfium.PdfDocument(source)
            except pdfium.PdfiumError as error:
                what = (
                    "is locked by a password" if "password" in str(error).lower() else "is broken"
                )
                raise UserError(
                    f"{where} is a PDF that {what}; save it anew, or give a picture of the page"
                ) from None
            self._document.init_forms()
            self.number = len(self._document)

    def go_to(self, index: int | None) -> PageHeader:
        """Chooses page `index` from 0, or the first."""
        self._index = index or 0
        return PageHeader(((LONG_SIDE, LONG_SIDE),), _DRAWING_BYTES)

    def read(self) -> Picture:
        """The chosen page: RGB on white, its long side `LONG_SIDE` pixels."""
        with _PDFIUM:
            page = self._document[self._index]
            bitmap = page.render(scale=LONG_SIDE / max(page.get_size()))
            image: Image.Image = bitmap.to_pil().convert("RGB")
            bitmap.close()
            page.close()
            return Picture(image, self._where)

    def __enter__(self) -> PdfPages:
        return self

    def __exit__(self, *_: object) -> None:
        with _PDFIUM:
            self._document.close()


def _pdfium(where: str) -> ModuleType:
    try:
        return importlib.import_module("pypdfium2")
    except ImportError:
        raise UserError(
            f"{where} is a PDF, which needs the package pypdfium2; pip install -r "
            "requirements/pictures.txt, or give a picture of the page"
        ) from None
