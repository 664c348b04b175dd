"Train multimodal models with Megatron-Core from a notebook; the names below are imported when they are asked for."
__version__ = "0.1.0"

from .device import leave_npu_out

leave_npu_out()         # on a half-installed Ascend machine `import torch` would fail

NAMES = {
    'Config': 'mmkit.config', 'Layout': 'mmkit.config', 'Optim': 'mmkit.config', 'Data': 'mmkit.config', 'Columns': 'mmkit.config', 'Loop': 'mmkit.config',
    'Film': 'mmkit.config', 'Clips': 'mmkit.config', 'Flow': 'mmkit.config', 'Sampling': 'mmkit.config',
    'load_config': 'mmkit.config', 'override': 'mmkit.values', 'form': 'mmkit.forms', 'survey': 'mmkit.datasets.survey', 'estimate': 'mmkit.forecast', 'speed_of': 'mmkit.forecast',
    'hf_to_mm': 'mmkit.converters.convert', 'mm_to_hf': 'mmkit.converters.convert', 'qwen2_5_vl_towers': 'mmkit.converters.qwen2_5_vl',
    'wan2_1_towers': 'mmkit.converters.wan2_1', 'convert_wan': 'mmkit.convert_cli', 'extract': 'mmkit.extraction', 'film': 'mmkit.trainer.film', 'open_film': 'mmkit.trainer.film',
    'llava_to_mllm': 'mmkit.datasets.llava', 'PRESETS': 'mmkit.trainer.presets', 'chat': 'mmkit.trainer.chat', 'open_chat': 'mmkit.trainer.chat',
    'from_mindspeed_mm': 'mmkit.peer', 'launch': 'mmkit.run', 'Run': 'mmkit.run', 'resume': 'mmkit.again', 'plot_losses': 'mmkit.show', 'show_samples': 'mmkit.show', 'compare': 'mmkit.show', 'watch': 'mmkit.show',
}


def __getattr__(name: str):
    if name not in NAMES: raise AttributeError(f"module 'mmkit' has no attribute {name!r}; it hands out {', '.join(sorted(NAMES))}")
    from importlib import import_module
    return getattr(import_module(NAMES[name]), name)


def __dir__(): return sorted([*globals(), *NAMES])
