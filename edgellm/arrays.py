"""Names for the array types that signatures use, and where an array is."""

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
Array = npt.NDArray[Any]


def address(array: Array) -> int:
    """Of the first element; sooner there than array.ctypes.data."""
    at: int = array.__array_interface__["data"][0]
    return at
