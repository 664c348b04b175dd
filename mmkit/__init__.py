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
    'plan': 'mmkit.trainer.plan',
    'doctor': 'mmkit.diagnostics.doctor',
    'first_run': 'mmkit.recipes.first_run',
    'Conversations': 'mmkit.datasets.conversation',
    'Features': 'mmkit.datasets.features',
    'open_task': 'mmkit.trainer.task',
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
    from .config import (
        Clips as Clips,
    )
    from .config import (
        Columns as Columns,
    )
    from .config import (
        Config as Config,
    )
    from .config import (
        Data as Data,
    )
    from .config import (
        Flow as Flow,
    )
    from .config import (
        Layout as Layout,
    )
    from .config import (
        Loop as Loop,
    )
    from .config import (
        Optim as Optim,
    )
    from .config import (
        Sampling as Sampling,
    )
    from .config import (
        VideoData as VideoData,
    )
    from .config import (
        load_config as load_config,
    )
    from .converters.convert import hf_to_mm as hf_to_mm
    from .converters.convert import mm_to_hf as mm_to_hf
    from .converters.qwen2_5_vl import qwen2_5_vl_towers as qwen2_5_vl_towers
    from .converters.wan2_1 import wan2_1_towers as wan2_1_towers
    from .core.values import override as override
    from .datasets.conversation import Conversations as Conversations
    from .datasets.features import Features as Features
    from .datasets.llava import llava_to_mllm as llava_to_mllm
    from .datasets.statistics import data_statistics as data_statistics
    from .diagnostics.doctor import doctor as doctor
    from .launcher.estimate import estimate as estimate
    from .launcher.estimate import speed_of as speed_of
    from .launcher.extract import extract as extract
    from .launcher.hosts import (
        Hosts as Hosts,
    )
    from .launcher.hosts import (
        launch_on as launch_on,
    )
    from .launcher.hosts import (
        prepare_run as prepare_run,
    )
    from .launcher.hosts import (
        shell_script as shell_script,
    )
    from .launcher.hosts import (
        slurm_script as slurm_script,
    )
    from .launcher.resume import resume as resume
    from .launcher.run import Run as Run
    from .launcher.run import launch as launch
    from .mindspeed_mm.config import from_mindspeed_mm as from_mindspeed_mm
    from .mindspeed_mm.convert import convert_wan as convert_wan
    from .notebook.forms import form as form
    from .notebook.show import (
        compare as compare,
    )
    from .notebook.show import (
        plot_losses as plot_losses,
    )
    from .notebook.show import (
        runs as runs,
    )
    from .notebook.show import (
        show_samples as show_samples,
    )
    from .notebook.show import (
        watch as watch,
    )
    from .notebook.show import (
        watch_async as watch_async,
    )
    from .recipes.first_run import first_run as first_run
    from .recipes.presets import PRESETS as PRESETS
    from .trainer.chat import chat as chat
    from .trainer.chat import open_chat as open_chat
    from .trainer.plan import plan as plan
    from .trainer.sampling import generate as generate
    from .trainer.sampling import open_pipeline as open_pipeline
    from .trainer.task import open_task as open_task
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
