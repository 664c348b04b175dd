"Train multimodal models with Megatron-Core from a notebook; the names below are imported when they are asked for."
__version__ = "0.1.0"

from typing import TYPE_CHECKING

from .device import leave_npu_out

leave_npu_out()         # on a half-installed Ascend machine `import torch` would fail

NAMES = {
    'Config': 'mmkit.config', 'Layout': 'mmkit.config', 'Optim': 'mmkit.config', 'Data': 'mmkit.config', 'Columns': 'mmkit.config', 'Loop': 'mmkit.config',
    'Film': 'mmkit.config', 'Clips': 'mmkit.config', 'Flow': 'mmkit.config', 'Sampling': 'mmkit.config',
    'load_config': 'mmkit.config', 'override': 'mmkit.values', 'form': 'mmkit.forms', 'survey': 'mmkit.datasets.survey', 'estimate': 'mmkit.forecast', 'speed_of': 'mmkit.forecast',
    'hf_to_mm': 'mmkit.converters.convert', 'mm_to_hf': 'mmkit.converters.convert', 'qwen2_5_vl_towers': 'mmkit.converters.qwen2_5_vl',
    'wan2_1_towers': 'mmkit.converters.wan2_1', 'convert_wan': 'mmkit.convert_cli', 'extract': 'mmkit.extraction', 'film': 'mmkit.trainer.film', 'open_film': 'mmkit.trainer.film',
    'llava_to_mllm': 'mmkit.datasets.llava', 'PRESETS': 'mmkit.trainer.presets', 'chat': 'mmkit.trainer.chat', 'open_chat': 'mmkit.trainer.chat',
    'from_mindspeed_mm': 'mmkit.peer', 'launch': 'mmkit.run', 'Run': 'mmkit.run', 'resume': 'mmkit.again', 'plot_losses': 'mmkit.show', 'show_samples': 'mmkit.show', 'compare': 'mmkit.show', 'watch': 'mmkit.show', 'watch_async': 'mmkit.show', 'runs': 'mmkit.show',
    'launch_on': 'mmkit.hosts', 'Hosts': 'mmkit.hosts', 'prepare_run': 'mmkit.hosts', 'shell_script': 'mmkit.hosts', 'slurm_script': 'mmkit.hosts',
}


if TYPE_CHECKING:       # what type checkers and editors read; tests/test_types.py holds it against NAMES
    from .again import resume as resume
    from .config import Config as Config, Layout as Layout, Optim as Optim, Data as Data, Columns as Columns, Loop as Loop, Film as Film, Clips as Clips, Flow as Flow, Sampling as Sampling, load_config as load_config
    from .convert_cli import convert_wan as convert_wan
    from .converters.convert import hf_to_mm as hf_to_mm, mm_to_hf as mm_to_hf
    from .converters.qwen2_5_vl import qwen2_5_vl_towers as qwen2_5_vl_towers
    from .converters.wan2_1 import wan2_1_towers as wan2_1_towers
    from .datasets.llava import llava_to_mllm as llava_to_mllm
    from .datasets.survey import survey as survey
    from .extraction import extract as extract
    from .forecast import estimate as estimate, speed_of as speed_of
    from .forms import form as form
    from .hosts import Hosts as Hosts, launch_on as launch_on, prepare_run as prepare_run, shell_script as shell_script, slurm_script as slurm_script
    from .peer import from_mindspeed_mm as from_mindspeed_mm
    from .run import launch as launch, Run as Run
    from .show import plot_losses as plot_losses, show_samples as show_samples, compare as compare, watch as watch, watch_async as watch_async, runs as runs
    from .trainer.chat import chat as chat, open_chat as open_chat
    from .trainer.film import film as film, open_film as open_film
    from .trainer.presets import PRESETS as PRESETS
    from .values import override as override
else:
    def __getattr__(name: str):
        if name not in NAMES: raise AttributeError(f"module 'mmkit' has no attribute {name!r}; it hands out {', '.join(sorted(NAMES))}")
        from importlib import import_module
        return getattr(import_module(NAMES[name]), name)


def __dir__(): return sorted([*globals(), *NAMES])
