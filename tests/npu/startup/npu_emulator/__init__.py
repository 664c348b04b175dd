"""An NPU on the CPU: the real torch_npu wheel on a CANN without a device, with formulas for the operators.

`calls` counts the fused operators and collectives that ran in this process, `doubtful` the operators of torch
that made float64 or complex numbers on the device, which works here and hardly there. With
NPU_EMULATOR_CALLS=FOLDER every process leaves both there when it ends.
"""

from collections import Counter

calls = Counter()
doubtful = Counter()


class NotEmulated(NotImplementedError):
    "An operator, or a way to call it, for which the emulator has no formula."
