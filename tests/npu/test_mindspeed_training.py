"""The training of test_training.py with MindSpeed's adaptor around Megatron-Core, on one rank and on two,
saved and begun again too: the same losses.
"""

import os

import parity
import pytest
from npu.test_training import compare, cpu  # noqa: F401  a fixture


@pytest.mark.parametrize('ranks', (1, 2))
def test_mindspeed_gives_the_losses_of_the_cpu(cpu, ranks, monkeypatch, record_property):  # noqa: F811
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.environ['PYTHONPATH'], os.environ['MINDSPEED']]))
    found = parity.on_ranks('npu.test_training', 'on_npu', cpu[0], ranks, 1500)
    assert all(row['mindspeed'] for row in found.values())
    compare(cpu[0], found, cpu[1], record_property)
