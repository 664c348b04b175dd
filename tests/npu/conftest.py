"""Tests on emulated NPUs.

They are collected only in the environment of prepare.py, and the end of every run says what was proved, or
that nothing was.
"""

import os
import sys
from pathlib import Path

EMULATED, MINDSPEED = os.environ.get('NPU_EMULATOR'), os.environ.get('MINDSPEED')
collect_ignore_glob = [] if EMULATED else ['test_*.py']
if not MINDSPEED:
    collect_ignore_glob.append('test_mindspeed*.py')
# the others are the same with it as without: neither they nor processes that they start find it
else:

    def apart(paths):
        return [path for path in paths if path != str(Path(MINDSPEED).resolve())]

    sys.path[:], os.environ['PYTHONPATH'] = (
        apart(sys.path),
        os.pathsep.join(apart(os.environ['PYTHONPATH'].split(os.pathsep))),
    )

PROVED = """Proved on emulated NPUs: this code calls torch_npu 2.13.0 with arguments that the wheel's own host code accepts, wires autograd, devices and
process groups right, and gives the CPU's numbers when each fused operator obeys its documented formula.
Not proved here: speed, memory, the device's rounding in bfloat16, that its kernels obey the documentation, internal formats, the order of streams
and overlap (every call has ended when it returns), HCCL's time limits and topology, other versions of CANN, limits that CANN checks itself."""  # noqa: E501
WITH = f'MindSpeed: its adaptor from {MINDSPEED} patched Megatron-Core in these runs.'
WITHOUT = (
    'MindSpeed: nothing; its tests are collected with MINDSPEED=FOLDER, the source at the commit that README'
    ' names.'
)
NOTHING = (
    'tests/npu: not collected, this environment has no emulated NPUs; python tests/npu/prepare.py FOLDER'
    ' pytest tests/npu has.'
)


def pytest_configure(config):
    "Ranks import the tests, too, and must know how long to train."
    os.environ['NPU_STEPS'] = str(config.getoption('steps') or 4)


def pytest_terminal_summary(terminalreporter):
    "The last words of a run."
    for line in [PROVED, WITH if MINDSPEED else WITHOUT] if EMULATED else [NOTHING]:
        terminalreporter.write_line(line)
