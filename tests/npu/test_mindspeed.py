"""MindSpeed's real adaptor patches Megatron-Core on an emulated NPU, and a patched model gives the numbers of
a plain one on the CPU.

Collected only with MINDSPEED=FOLDER, a copy of MindSpeed's source at the commit that README names.
"""

import json
import os
import subprocess
import sys

import pytest

LIMIT = 1e-5
MODEL = """
import json, os, sys
side, out = sys.argv[1:]
if side == 'npu':
    sys.argv = ['train', '--use-flash-attn', '--use-fused-rmsnorm', '--use-fused-swiglu']
    import torch, torch_npu
    import mindspeed.megatron_adaptor
    from mindspeed.patch_utils import MindSpeedPatchesManager
    import npu_emulator
else:
    from mmkit.core.device import DEVICES
    from mmkit.parallel.engine import prepare
    prepare(DEVICES['cpu'])
    import torch
import torch.distributed as dist
import torch.nn.functional as F
os.environ.update(MASTER_ADDR='127.0.0.1', RANK='0', WORLD_SIZE='1')
dist.init_process_group('hccl' if side == 'npu' else 'gloo', store=dist.HashStore(), rank=0, world_size=1)
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
parallel_state.initialize_model_parallel()
tensor_parallel.model_parallel_cuda_manual_seed(1)
config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2, ffn_hidden_size=96, normalization='RMSNorm', gated_linear_unit=True,
    activation_func=F.silu, bias_activation_fusion=side == 'npu', add_bias_linear=False, add_qkv_bias=True, use_cpu_initialization=True, attention_dropout=0.0,
    hidden_dropout=0.0, masked_softmax_fusion=False, gradient_accumulation_fusion=False)
model = GPTModel(config, get_gpt_layer_local_spec(normalization='RMSNorm'), 128, 64, position_embedding_type='rope', share_embeddings_and_output_weights=False)
numbers = torch.Generator().manual_seed(1)
for name, weight in sorted(model.named_parameters()): weight.data.copy_(torch.randn(weight.shape, generator=numbers) * 0.05 if weight.dim() > 1 else torch.full(weight.shape, 0.5))
model = model.to(side)
tokens = torch.randint(0, 128, (2, 16), generator=numbers).to(side)
places, hidden = torch.arange(16)[None].expand(2, -1).to(side), torch.ones(1, 1, 16, 16).triu(1).bool().to(side)
loss = model(tokens, places, hidden, labels=tokens).float().mean()
loss.backward()
found = {'loss': loss.item(), 'device': loss.device.type, 'gradients': {name: weight.grad.float().norm().item() for name, weight in model.named_parameters()}}
if side == 'npu': found.update(calls=dict(npu_emulator.calls), patches=len(MindSpeedPatchesManager.patches_info))
json.dump(found, open(out, 'w'))
dist.destroy_process_group()
"""  # noqa: E501


def with_mindspeed():
    return {**os.environ, 'PYTHONPATH': os.pathsep.join([os.environ['PYTHONPATH'], os.environ['MINDSPEED']])}


@pytest.fixture(scope='module')
def found(tmp_path_factory):
    """What the model gives: on the NPU under MindSpeed, on the CPU without.

    In two processes, because the adaptor cannot be undone.
    """
    folder = tmp_path_factory.mktemp('mindspeed')
    (folder / 'model.py').write_text(MODEL)
    for side in ('npu', 'cpu'):
        ran = subprocess.run(
            [sys.executable, '-W', 'ignore', folder / 'model.py', side, folder / side],
            env=with_mindspeed(),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    return {side: json.loads((folder / side).read_text()) for side in ('npu', 'cpu')}


def test_the_doctor_sees_it():
    ask = (
        'from mmkit.diagnostics.doctor import doctor; print([(one.found, one.remedy) for one in doctor() if'
        ' one.name == "MindSpeed"])'
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', ask], env=with_mindspeed(), capture_output=True, text=True, timeout=120
        ).stdout.strip()
        == "[('installed', '')]"
    )


def test_the_adaptor_patches_megatron(found):
    assert found['npu']['device'] == 'npu' and found['npu']['patches'] > 70


def test_fused_operators_were_called(found):
    "Two layers: attention and swiglu once each, norms twice and one at the end; each with its gradient."
    counts = {name: count for name, count in found['npu']['calls'].items() if name.startswith('npu_')}
    assert counts == {
        'npu_fusion_attention': 2,
        'npu_fusion_attention_grad': 2,
        'npu_rms_norm': 5,
        'npu_rms_norm_backward': 5,
        'npu_swiglu': 2,
        'npu_swiglu_backward': 2,
    }


def test_loss_and_gradients_are_those_of_the_cpu(found):
    mine, theirs = found['npu'], found['cpu']
    assert (
        abs(mine['loss'] - theirs['loss']) < LIMIT * theirs['loss']
        and mine['gradients'].keys() == theirs['gradients'].keys()
    )
    assert all(
        abs(mine['gradients'][name] - size) <= LIMIT * size for name, size in theirs['gradients'].items()
    )
