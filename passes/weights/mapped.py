"""Files that stay mapped for who reads their tensors again and again."""

from __future__ import annotations

import numpy as np

from passes.weights.recipe import Array, Source
from passes.weights.sources import as_array, look_at, read, whole_file


class MappedFiles:
    """Reads sources from files that stay mapped while this lives: each file once, whatever number of tensors it has.

    To map a tensor anew costs a page fault for every 4 to 64 kB of it at every read.
    """

    def __init__(self) -> None:
        self._files: dict[str, Array] = {}

    def read(self, source: Source) -> Array:
        """As `passes.weights.sources.read`; mapped where the array is the bytes of a file as they are."""
        if source.kind != "raw" or source.length == 0:
            return read(source)
        if source.path not in self._files:
            self._files[source.path] = np.memmap(whole_file(source), np.uint8, "r")
        data = self._files[source.path][source.offset : source.offset + source.length]
        array = as_array(data, source.dtype, source.shape)
        look_at(array, source)
        return array
