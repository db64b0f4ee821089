"""Short names for the array types that the kernels take."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float32Array: TypeAlias = npt.NDArray[np.float32]
Int32Array: TypeAlias = npt.NDArray[np.int32]
KvArray: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.uint16]
Float64Array: TypeAlias = npt.NDArray[np.float64]
