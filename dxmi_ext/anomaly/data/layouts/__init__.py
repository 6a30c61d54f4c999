"""Layouts of collections of good and defective images on disk, and their training and test splits.

`recognition` finds the layout; `mvtec`, `visa`, `folders` and `archive` read one each. The package imports
numpy and ``dxmi_ext``; Pillow where an image is decoded.
"""

from dxmi_ext.anomaly.data.layouts.items import Item, Source, natural, picture_item
from dxmi_ext.anomaly.data.layouts.recognition import LAYOUTS, find, recognizes
from dxmi_ext.images.data.contents import ImageDataError

__all__ = [
    "LAYOUTS",
    "ImageDataError",
    "Item",
    "Source",
    "find",
    "natural",
    "picture_item",
    "recognizes",
]
