"""What the compiler must refuse, beside a kernel that is right."""

from tests.engine_runtime.kernels.tiny_kernels import ADD, BROKEN

SPECS = [BROKEN, ADD]
