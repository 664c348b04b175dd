"""Turns the torch_npu that was just imported into an emulated device."""

import torch

from npu_emulator import aten, attention, collectives, formulas, fused

LIBRARIES = {}  # what is registered holds as long as these live


def install():
    "Gives operators of torch, fused operators and collectives their kernels on the CPU, once."
    if LIBRARIES:
        return
    LIBRARIES.update({name: torch.library.Library(name, 'IMPL') for name in ('aten', 'npu', 'c10d')})
    fused.install(LIBRARIES['npu'], {**attention.FORMULAS, **formulas.FORMULAS, **collectives.FORMULAS})
    fused.install(LIBRARIES['aten'], formulas.ATEN_FORMULAS)
    aten.install(LIBRARIES['aten'], without=formulas.ATEN_FORMULAS)
    collectives.install(LIBRARIES['c10d'])
