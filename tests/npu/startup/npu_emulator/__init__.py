"""An NPU on the CPU: the real torch_npu wheel on a CANN without a device, with formulas for the operators.

`calls` counts the fused operators that ran in this process. With NPU_EMULATOR_CALLS=FOLDER every process leaves its counts there when it ends."""
from collections import Counter

calls = Counter()


class NotEmulated(NotImplementedError):
    "An operator, or a way to call it, for which the emulator has no formula."
