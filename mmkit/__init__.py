"Train multimodal models with Megatron-Core from a notebook; the names below are imported when they are asked for."

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .core.device import leave_npu_out

leave_npu_out()  # on a half-installed Ascend machine `import torch` would fail

NAMES = {
    'Config': 'mmkit.config',
    'Layout': 'mmkit.config',
    'Optim': 'mmkit.config',
    'Data': 'mmkit.config',
    'Columns': 'mmkit.config',
    'Loop': 'mmkit.config',
    'VideoData': 'mmkit.config',
    'Clips': 'mmkit.config',
    'Flow': 'mmkit.config',
    'Sampling': 'mmkit.config',
    'load_config': 'mmkit.config',
    'override': 'mmkit.core.values',
    'form': 'mmkit.notebook.forms',
    'data_statistics': 'mmkit.datasets.statistics',
    'estimate': 'mmkit.launcher.estimate',
    'speed_of': 'mmkit.launcher.estimate',
    'hf_to_mm': 'mmkit.converters.convert',
    'mm_to_hf': 'mmkit.converters.convert',
    'qwen2_5_vl_towers': 'mmkit.converters.qwen2_5_vl',
    'wan2_1_towers': 'mmkit.converters.wan2_1',
    'convert_wan': 'mmkit.mindspeed_mm.convert',
    'extract': 'mmkit.launcher.extract',
    'generate': 'mmkit.trainer.sampling',
    'open_pipeline': 'mmkit.trainer.sampling',
    'llava_to_mllm': 'mmkit.datasets.llava',
    'PRESETS': 'mmkit.recipes.presets',
    'chat': 'mmkit.trainer.chat',
    'open_chat': 'mmkit.trainer.chat',
    'from_mindspeed_mm': 'mmkit.mindspeed_mm.config',
    'launch': 'mmkit.launcher.run',
    'Run': 'mmkit.launcher.run',
    'resume': 'mmkit.launcher.resume',
    'plot_losses': 'mmkit.notebook.show',
    'show_samples': 'mmkit.notebook.show',
    'compare': 'mmkit.notebook.show',
    'watch': 'mmkit.notebook.show',
    'watch_async': 'mmkit.notebook.show',
    'runs': 'mmkit.notebook.show',
    'launch_on': 'mmkit.launcher.hosts',
    'Hosts': 'mmkit.launcher.hosts',
    'prepare_run': 'mmkit.launcher.hosts',
    'shell_script': 'mmkit.launcher.hosts',
    'slurm_script': 'mmkit.launcher.hosts',
}


if TYPE_CHECKING:  # what type checkers and editors read; tests/test_types.py holds it against NAMES
    from .launcher.resume import resume as resume
    from .config import (
        Config as Config,
        Layout as Layout,
        Optim as Optim,
        Data as Data,
        Columns as Columns,
        Loop as Loop,
        VideoData as VideoData,
        Clips as Clips,
        Flow as Flow,
        Sampling as Sampling,
        load_config as load_config,
    )
    from .mindspeed_mm.convert import convert_wan as convert_wan
    from .converters.convert import hf_to_mm as hf_to_mm, mm_to_hf as mm_to_hf
    from .converters.qwen2_5_vl import qwen2_5_vl_towers as qwen2_5_vl_towers
    from .converters.wan2_1 import wan2_1_towers as wan2_1_towers
    from .datasets.llava import llava_to_mllm as llava_to_mllm
    from .datasets.statistics import data_statistics as data_statistics
    from .launcher.extract import extract as extract
    from .launcher.estimate import estimate as estimate, speed_of as speed_of
    from .notebook.forms import form as form
    from .launcher.hosts import (
        Hosts as Hosts,
        launch_on as launch_on,
        prepare_run as prepare_run,
        shell_script as shell_script,
        slurm_script as slurm_script,
    )
    from .mindspeed_mm.config import from_mindspeed_mm as from_mindspeed_mm
    from .launcher.run import launch as launch, Run as Run
    from .notebook.show import (
        plot_losses as plot_losses,
        show_samples as show_samples,
        compare as compare,
        watch as watch,
        watch_async as watch_async,
        runs as runs,
    )
    from .trainer.chat import chat as chat, open_chat as open_chat
    from .trainer.sampling import generate as generate, open_pipeline as open_pipeline
    from .recipes.presets import PRESETS as PRESETS
    from .core.values import override as override
else:

    def __getattr__(name: str):
        if name not in NAMES:
            raise AttributeError(
                f"module 'mmkit' has no attribute {name!r}; it hands out {', '.join(sorted(NAMES))}"
            )
        from importlib import import_module

        return getattr(import_module(NAMES[name]), name)


def __dir__():
    return sorted([*globals(), *NAMES])
