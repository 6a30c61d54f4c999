"""The masks of a collection, by the names of its images."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dxmi_ext.images.data import listing
from dxmi_ext.images.data.contents import ImageDataError
from dxmi_ext.images.data.listing import Folder


class Masks:
    """The masks of a collection or a class: MASKS/KIND/NAME.png or MASKS/NAME.png, or NAME_mask.png.

    Args:
        folders: folders with a name for masks, at most one.
        where: path of their parent folder, for errors.
        required: whether masks are required.

    Raises:
        ImageDataError: there are several folders.
    """

    def __init__(self, folders: dict[str, Folder], where: str, *, required: bool = False) -> None:
        if len(folders) > 1:
            names = listing.listed(folders)
            raise ImageDataError(f"data: {where}: {names} could all be masks; keep one")
        self._folder = next(iter(folders.values()), None)
        self._expected = os.path.join(where, "ground_truth") if required and self._folder is None else None
        self._found, self._used = dict[str, str](), dict[str, str]()
        if self._folder is not None:
            for file in sorted(file for inner in self._folder.walk() for file in inner.images):
                name = listing.stem_of(file, self._folder.path).lower()
                self._found[name] = file
                self._found.setdefault(listing.without_mask(name), file)

    def of(self, image: str, kind: str, folder: Folder) -> str | None:
        """The mask of an image in the folder of a kind; None if the collection has no masks.

        Raises:
            ImageDataError: the mask is missing, or also belongs to another image.
        """
        name = listing.stem_of(image, folder.path)
        if self._expected is not None:
            raise missing_mask(image, _names(self._expected, kind, name))
        if self._folder is None:
            return None
        candidates = [os.path.join(kind, name), name, os.path.join(kind, os.path.basename(name))]
        mask = next((found for c in candidates if (found := self._found.get(c.lower()))), None)
        if mask is None:
            by = f"; {os.path.basename(self._folder.path)}/ is for masks; rename it if it is a kind of defect"
            raise ImageDataError(f"{missing_mask(image, _names(self._folder.path, kind, name))}{by}")
        if (other := self._used.setdefault(mask, image)) != image:
            raise ImageDataError(
                f"{mask}: a mask must be of one image (MASKS/KIND/NAME.png), got {image} and {other}"
            )
        return mask


def _names(masks: str, kind: str, name: str) -> list[str]:
    """The usual paths of the mask of an image."""
    return [os.path.join(masks, f"{kind}/{name}{end}.png") for end in ("_mask", "")]


def missing_mask(image: str, wanted: Sequence[str]) -> ImageDataError:
    return ImageDataError(f"{image}: its mask is missing, expected {' or '.join(wanted)}")
