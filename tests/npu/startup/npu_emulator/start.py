"""What must happen before torch is imported, and right after torch_npu was. Needs nothing but Python."""

import atexit
import ctypes
import importlib.machinery
import json
import os
import sys
from pathlib import Path

from npu_emulator import calls, doubtful


def preload(folder):
    "Loads the libraries of a CANN without a device into this process, so that the wheel finds them by name."
    for name in ['libascendcl.so', *sorted(path.name for path in Path(folder).glob('lib*.so'))]:
        ctypes.CDLL(os.path.join(folder, name), mode=ctypes.RTLD_GLOBAL)


class ThenInstall(importlib.machinery.SourceFileLoader):
    "Loads torch_npu, then installs the emulator."

    def exec_module(self, module):
        super().exec_module(module)
        from npu_emulator.install import install

        install()


class Finder:
    "Finds torch_npu where Python would."

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name != 'torch_npu':
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec:
            spec.loader = ThenInstall(name, spec.loader.path)
        return spec


def write_calls(folder):
    "Leaves the counts of this process in a folder, under the rank's number or the process's."
    for kind, counts in (('calls', calls), ('doubtful', doubtful)):
        if counts:
            Path(folder, f'{kind}-{os.environ.get("RANK", "")}-{os.getpid()}.json').write_text(
                json.dumps(counts)
            )


def install_after_import():
    """From now on, importing torch_npu installs the emulator.

    The counts are written at the end if somebody wants them.
    """
    sys.meta_path.insert(0, Finder)
    if folder := os.environ.get('NPU_EMULATOR_CALLS'):
        atexit.register(write_calls, folder)
