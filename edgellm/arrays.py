"""Names for the array types that signatures use."""

from typing import Any

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F16 = npt.NDArray[np.float16]
U8 = npt.NDArray[np.uint8]
I32 = npt.NDArray[np.int32]
Array = npt.NDArray[Any]
