"""Python runs this at the start of every process that has this folder on PYTHONPATH: the emulated NPU is
there before torch is.
"""

import os

if os.environ.get('NPU_EMULATOR'):
    from npu_emulator import start

    start.preload(os.environ['NPU_EMULATOR'])
    start.install_after_import()
