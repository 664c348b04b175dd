"""An example of MindSpeed-MM becomes a config in which no word of it is lost: small files in the peer's
formats, written here.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmkit.cli import mmkit as command
from mmkit.config import load_config
from mmkit.core.values import mistake
from mmkit.mindspeed_mm.config import from_mindspeed_mm

GOLDEN = Path(__file__).parent / 'golden'
QWEN = r"""
export TASK_QUEUE_ENABLE=2
NPUS_PER_NODE=8
NNODES=1
NODE_RANK=0
WORLD_SIZE=$(($NPUS_PER_NODE*$NNODES))
TP=2
PP=2
GRAD_ACC_STEP=6
LEFT_BEHIND=1
DP=$(($WORLD_SIZE/$TP/$PP))
GBS=$((1*$GRAD_ACC_STEP*$DP))
DISTRIBUTED_ARGS="
    --nproc_per_node $NPUS_PER_NODE \
    --nnodes $NNODES --node_rank $NODE_RANK
"
GPT_ARGS="
    --use-mcore-models \
    --tensor-model-parallel-size ${TP} \
    --pipeline-model-parallel-size ${PP} \
    --sequence-parallel \
    --context-parallel-size 1 --context-parallel-algo megatron_cp_algo \
    --micro-batch-size 1 \
    --global-batch-size ${GBS} \
    --seq-length 512 \
    --vocab-size 64 --use-flash-attn \
    --lr 2.0e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-fraction 0.1 --train-iters 200 \
    --clip-grad 0.0 --adam-beta2 0.95 --seed 7 --bf16 --num-workers 3 \
    --no-load-optim \  # not loaded
    --no-load-rng \
    --no-save-optim \
    --no-save-rng \
    --use-distributed-optimizer --overlap-grad-reduce \
    --recompute-granularity full --recompute-method block --recompute-num-layers 2 \
"
OUTPUT_ARGS=(
    --save-interval 50
    --save $SAVE_PATH
)
logfile=$(date +%Y%m%d)
torchrun $DISTRIBUTED_ARGS pretrain_vlm.py $GPT_ARGS "${OUTPUT_ARGS[@]}" --load ckpt/mm \
    --mm-data ./examples/qwen/data.json --mm-model ./examples/qwen/model.json --mm-tool ./tools.json --distributed-backend nccl 2>&1 | tee logs/${logfile}.log
STEP_TIME=`grep "elapsed" logs/${logfile}.log`
"""  # noqa: E501
QWEN_MODEL = {
    'model_id': 'qwen2_5vl',
    'img_context_token_id': 151655,
    'image_encoder': {
        'vision_encoder': {
            'model_id': 'qwen2vit',
            'num_layers': 3,
            'pipeline_num_layers': [3, 0],
            'hidden_dropout': 0.0,
            'bf16': True,
        },
        'vision_projector': {'model_id': 'lnmlp', 'freeze': True, 'normalization': 'RMSNorm'},
    },
    'text_decoder': {
        'num_layers': 4,
        'pipeline_num_layers': [1, 3],
        'rope_scaling': None,
        'num_query_groups': 2,
    },
    'text_encoder': None,
}
QWEN_DATA = {
    'dataset_param': {
        'dataset_type': 'huggingface',
        'preprocess_parameters': {'model_name_or_path': './hf', 'image_max_pixels': 4096, 'video_fps': 1.0},
        'basic_parameters': {
            'template': 'qwen2vl',
            'dataset_dir': './data',
            'dataset': './a.json,./b.json',
            'cache_dir': './cache',
            'max_samples': None,
            'train_on_prompt': True,
            'packing': False,
        },
        'attr': {'images': 'pictures', 'videos': None, 'role_tag': 'from', 'function_tag': None},
    },
    'dataloader_param': {'shuffle': False, 'drop_last': True, 'collate_param': {'model_name': 'qwen2vl'}},
}
WAN = r"""
NPUS_PER_NODE=4
CP=4
MBS=1
GBS=$(($NPUS_PER_NODE*$MBS/$CP))
torchrun --nproc_per_node $NPUS_PER_NODE pretrain_sora.py --pipeline-model-parallel-size 1 --virtual-pipeline-model-parallel-size 1 \
  --context-parallel-size ${CP} --context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2 --micro-batch-size ${MBS} --global-batch-size ${GBS} \
  --lr 1e-5 --lr-decay-style constant --lr-warmup-iters 0 --train-iters 10 --layerzero --layerzero-config examples/wan/zero.yaml --load weights/transformer/ \
  --mm-data ./examples/wan/data.json --mm-model ./examples/wan/model.json
"""  # noqa: E501
WAN_MODEL = {
    'load_video_features': True,
    'load_text_features': True,
    'task': 'i2v',
    'diffusion': {'model_id': 'wan_flow_match_scheduler', 'shift': 3, 'extra_one_step': False},
    'predictor': {'model_id': 'wandit', 'num_layers': 4, 'pipeline_num_layers': [2, 2], 'FPDT': False},
}
WAN_DATA = {
    'dataset_param': {
        'dataset_type': 'feature',
        'basic_parameters': {'data_path': 'features/list.jsonl', 'data_folder': 'features/'},
        'preprocess_parameters': {'num_frames': 17, 'max_height': 64, 'max_width': 96, 'hw_stride': 8},
        'tokenizer_config': [{'from_pretrained': 'pipe/tokenizer'}],
    },
    'dataloader_param': {'shuffle': True},
}


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "The top of a tree of the peer with two examples; the process stands in it."
    monkeypatch.chdir(tmp_path)
    for name, script, model, data in (
        ('qwen', QWEN, QWEN_MODEL, QWEN_DATA),
        ('wan', WAN, WAN_MODEL, WAN_DATA),
    ):
        folder = tmp_path / 'examples' / name
        folder.mkdir(parents=True)
        (folder / 'train.sh').write_text(script)
        (folder / 'model.json').write_text(json.dumps(model))
        (folder / 'data.json').write_text(json.dumps(data))
    (tmp_path / 'examples' / 'wan' / 'zero.yaml').write_text(
        'zero3_size: 8\nparam_dtype: "bf16"\nignored_modules:\n  - ae\n'
    )
    (tmp_path / 'tools.json').write_text(
        '{"profile": {"enable": false, "ranks": [0]}, "sorafeature": {"save_path": "./out"}}'
    )
    return tmp_path


def count_leaves(value):
    "How many leaves parsed JSON has; a list without objects is one."
    if isinstance(value, dict):
        return sum(map(count_leaves, value.values()))
    return (
        sum(map(count_leaves, value))
        if isinstance(value, list) and any(isinstance(x, dict) for x in value)
        else 1
    )


def edit(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_qwen(tree):
    config = from_mindspeed_mm('examples/qwen').config
    layout, optim, loop, data = config.layout, config.optim, config.loop, config.data
    assert (
        layout.tp,
        layout.pp,
        layout.sequence_parallel,
        layout.layers,
        layout.data_parallel,
        layout.overlap,
    ) == (2, 2, True, {'vision': ((3, 0),), 'text': ((1, 3),)}, 'zero1', True)
    assert (layout.recompute, layout.recompute_layers, layout.cp_kind) == ('full', 2, 'ring')
    assert (
        optim.lr,
        optim.min_lr,
        optim.schedule,
        optim.warmup,
        optim.clip,
        optim.betas,
        optim.weight_decay,
    ) == (2e-5, 1e-6, 'cosine', 20, 0.0, (0.9, 0.95), 0.01)
    assert (
        loop.steps,
        loop.global_batch,
        loop.micro_batch,
        loop.loss_reduction,
        loop.save_every,
        loop.save_optimizer,
    ) == (200, 12, 1, 'micro_batch', 50, False)
    assert (
        data.files,
        data.media_dir,
        data.max_length,
        data.image_max_pixels,
        data.train_on_prompt,
        data.shuffle,
        data.workers,
    ) == (('./a.json', './b.json'), './data', 512, 4096, True, False, 3)
    assert (data.columns.images, data.columns.videos, data.columns.role) == ('pictures', 'videos', 'from')
    assert (config.weights, config.processor, config.freeze, config.dtype, config.seed, config.resume) == (
        'ckpt/mm',
        './hf',
        ('vision', 'merger'),
        'bfloat16',
        7,
        'weights-only',
    )


def test_what_megatron_leaves_out_of_a_checkpoint_has_its_word_here(tree):
    """The four flags of the quick start: two of them decide, and what of the other two remains to be said is
    said.
    """
    mappings = {
        field.name: mapping
        for field, mapping in from_mindspeed_mm('examples/qwen').mappings
        if field.name.startswith('--no-')
    }
    assert {name: dict(mapping.settings) for name, mapping in mappings.items()} == {
        '--no-load-optim': {'resume': 'weights-only'},
        '--no-save-optim': {'loop.save_optimizer': False},
        '--no-load-rng': {},
        '--no-save-rng': {},
    }
    assert (
        'weights-only' in mappings['--no-load-rng'].words
        and 'always saved' in mappings['--no-save-rng'].words
    )
    for flag in mappings:
        edit(tree / 'examples/qwen/train.sh', f'    {flag} \\', '    \\')
    config = from_mindspeed_mm('examples/qwen').config
    assert (config.resume, config.loop.save_optimizer) == ('latest', True)


def test_wan(tree):
    config = from_mindspeed_mm('examples/wan').config
    assert (config.task, config.weights, config.processor, config.video.features, config.dtype) == (
        'wan2_1',
        'weights/transformer/',
        'pipe',
        'features/list.jsonl',
        'float32',
    )
    assert (
        config.layout.cp,
        config.layout.cp_kind,
        config.layout.cp_ulysses,
        config.layout.data_parallel,
        config.layout.layers,
        config.layout.vpp,
    ) == (4, 'usp', 2, 'fsdp', None, 1)
    assert (
        config.video.flow.shift,
        config.video.flow.extra_one_step,
        config.video.caption_dropout,
        config.video.clips.num_frames,
        config.loop.global_batch,
        config.seed,
    ) == (3.0, False, 0.0, 17, 1, 1234)


@pytest.mark.parametrize(
    'name, script, files', [('qwen', QWEN, (QWEN_MODEL, QWEN_DATA)), ('wan', WAN, (WAN_MODEL, WAN_DATA))]
)
def test_every_word_is_in_the_report(tree, name, script, files):
    report = from_mindspeed_mm(f'examples/{name}')
    told = {field.name for field, _ in report.mappings}
    assert {word for word in script.replace('=', ' ').split() if word.startswith('--')} <= told
    assert {'TASK_QUEUE_ENABLE', 'LEFT_BEHIND'} <= told or name == 'wan'
    for kind, parsed in zip(('model', 'data'), files):
        assert sum(field.kind == kind for field, _ in report.mappings) == count_leaves(parsed)
    assert sum(len(report.group(group)) for group in ('same', 'other', 'left')) == len(report.mappings)
    assert all(mapping.settings or mapping.words for _, mapping in report.mappings) and not any(
        mapping.loud for _, mapping in report.mappings
    )
    text, html = str(report), report._repr_html_()
    for field, _ in report.mappings:
        assert field.name in text and field.name in html


def test_what_changes_the_training_is_loud(tree):
    edit(tree / 'examples/qwen/train.sh', '--use-mcore-models', '--lora-r 8 --seed 3 --new-flag x')
    edit(tree / 'examples/qwen/model.json', '"hidden_dropout": 0.0', '"hidden_dropout": 0.1, "typo": 1')
    report = from_mindspeed_mm('examples/qwen')
    assert {field.name for field, mapping in report.mappings if mapping.loud} == {
        '--lora-r',
        '--new-flag',
        'image_encoder.vision_encoder.hidden_dropout',
        'image_encoder.vision_encoder.typo',
    }
    assert (
        ('--seed', 'repeated') in {(field.name, field.kind) for field, _ in report.mappings}
        and report.config.seed == 7
        and '! mmkit does not know it' in str(report)
    )


@pytest.mark.parametrize(
    'file, old, new, words',
    [
        ('qwen/model.json', '{"model_id"', '{model_id', ('model.json',)),
        (
            'qwen/model.json',
            '"freeze": true',
            '"freeze": "no"',
            ('model.json', 'vision_projector.freeze', 'true or false'),
        ),
        ('qwen/model.json', '[1, 3]', '"13"', ('model.json', 'text_decoder.pipeline_num_layers')),
        ('qwen/data.json', '4096', '"many"', ('data.json', 'image_max_pixels', 'number')),
        ('qwen/train.sh', '--lr 2.0e-5', '--lr', ('train.sh', '--lr ', 'number')),
        (
            'qwen/train.sh',
            '$WORLD_SIZE/$TP/$PP',
            '$WORLD_SIZE/$(($TP-2))',
            ('train.sh', 'sum of whole numbers'),
        ),
        ('qwen/train.sh', 'qwen/model.json', 'qwen/gone.json', ('train.sh', '--mm-model', 'gone.json')),
        ('qwen/model.json', 'qwen2_5vl', 'internvl', ('model_id', 'internvl')),
        ('qwen/train.sh', 'pretrain_vlm.py', 'pretrain_lumina.py', ('pretrain_lumina.py',)),
        ('wan/zero.yaml', 'ignored_modules:', '\t- [', ('zero.yaml', 'YAML')),
        ('qwen/train.sh', 'torchrun', 'echo', ('train.sh', 'no Python program')),
    ],
)
def test_broken_files_are_one_sentence(tree, file, old, new, words):
    edit(tree / 'examples' / file, old, new)
    said = mistake(from_mindspeed_mm, f'examples/{file[: file.index("/")]}')
    assert all(word in said for word in words) and '\n' not in said


@pytest.mark.parametrize(
    'file, old, new, words',
    [
        (
            'qwen/train.sh',
            'NNODES=1',
            'NNODES=$(cat hosts | wc -l)',
            ('--global-batch-size', 'NNODES', 'cat hosts'),
        ),
        ('qwen/train.sh', 'TP=2', 'if [ $1 ]; then\nTP=2\nfi', ('TP', 'branch')),
        (
            'qwen/train.sh',
            'megatron_cp_algo',
            'adaptive_cp_algo',
            ('--context-parallel-algo', 'hybrid_cp_algo'),
        ),
        ('qwen/train.sh', '--train-iters 200', '--train-samples 9', ('--train-iters',)),
        ('qwen/train.sh', '--bf16', '--fp16', ('--fp16', 'bf16')),
        ('qwen/model.json', '[3, 0]', '[3]', ('layout.layers.vision',)),
        ('qwen/train.sh', 'GRAD_ACC_STEP=6', 'GRAD_ACC_STEP=0', ('global_batch',)),
        ('qwen/train.sh', '--load ckpt/mm', '--load $CKPT', ('--load', 'CKPT', 'outside')),
    ],
)
def test_what_stands_in_the_way_is_told_in_the_report(tree, file, old, new, words, capsys):
    edit(tree / 'examples' / file, old, new)
    report = from_mindspeed_mm('examples/qwen')
    assert [field for field, _ in report.mappings if field.kind != 'default'] == list(report.example.fields)
    assert report.config is None and all(word in ' '.join(report.problems) for word in words)
    assert (
        command(['from-mindspeed-mm', 'examples/qwen', '--output', 'config.json']) == 1
        and not Path('config.json').exists()
    )
    out, err = capsys.readouterr()
    assert 'not carried over' in out and 'in the way: ' in out and err.count('\n') == 1


def test_variables_of_the_script_can_be_given(tree, capsys):
    edit(tree / 'examples/qwen/train.sh', 'NNODES=1', 'NNODES=$(cat hosts | wc -l)')
    assert command('from-mindspeed-mm examples/qwen NNODES=2 --output config.json'.split()) == 0
    assert (
        load_config('config.json').loop.global_batch == 24
        and from_mindspeed_mm('examples/qwen', given={'NNODES': '2'}).ranks == 16
    )
    assert 'wrote config.json' in capsys.readouterr().out
    assert (
        command('from-mindspeed-mm examples/qwen NNODES=2 --output config.json'.split()) == 1
        and 'already there' in capsys.readouterr().err
    )


def test_several_scripts_need_a_choice(tree):
    (tree / 'examples/qwen/other.sh').write_text(QWEN.replace('--seed 7', '--seed 8'))
    assert (
        'train.sh' in (said := mistake(from_mindspeed_mm, 'examples/qwen'))
        and 'other.sh' in said
        and '--script' in said
    )
    assert (
        from_mindspeed_mm('examples/qwen', 'other.sh').config.seed == 8
        and from_mindspeed_mm('examples/qwen', 'examples/qwen/other.sh').config.seed == 8
    )


def test_nothing_of_a_script_is_run(tree):
    for line in (
        'A=$(touch ran)',
        'B=`touch ran`',
        'C=$((`touch ran`))',
        'D="${E:-$(touch ran)}"',
        'export F=<(touch ran)',
    ):
        edit(tree / 'examples/qwen/train.sh', 'TP=2', f'{line}\nTP=2')
    assert from_mindspeed_mm('examples/qwen').config and not (tree / 'ran').exists()


def test_the_plan_takes_what_came_of_it(tree, capsys):
    (
        (tree / 'hf').symlink_to(GOLDEN / 'qwen2_5_vl_hf'),
        (tree / 'ckpt').mkdir(),
        (tree / 'ckpt/mm').symlink_to(GOLDEN / 'qwen2_5_vl_tp1'),
    )
    for name in 'ab':
        (tree / f'{name}.json').write_text('[]')
    assert command('from-mindspeed-mm examples/qwen --output config.json'.split()) == 0
    config = load_config('config.json')
    assert config == from_mindspeed_mm('examples/qwen').config and config.check(8) == 6
    assert command('plan config.json --ranks 8 device=cpu dtype=float32'.split()) == 0, (
        capsys.readouterr().err
    )


def test_files_of_two_models_are_refused(tree):
    (tree / 'hf').symlink_to(GOLDEN / 'qwen2_5_vl_hf')
    edit(tree / 'examples/qwen/model.json', '"num_layers": 4', '"num_layers": 5')
    said = ' '.join(from_mindspeed_mm('examples/qwen').problems)
    assert 'text_decoder.num_layers is 5' in said and 'num_hidden_layers=4' in said


def test_no_torch_is_imported(tree):
    code = (
        'import sys\nfrom mmkit.mindspeed_mm.config import'
        " from_mindspeed_mm\nstr(from_mindspeed_mm('examples/wan'))\nprint(*{'torch', 'numpy',"
        " 'transformers'} & set(sys.modules))"
    )
    assert (
        subprocess.run(
            [sys.executable, '-c', code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == ''
    )


@pytest.mark.parametrize(
    'file, text, words',
    [
        ('train.sh', 'A=(\n' * 20000, 'no Python program'),
        ('train.sh', 'A=1\n' + 'A=$A$A\n' * 60 + 'torchrun pretrain_sora.py --lr $A', 'grow without end'),
        ('train.sh', 'A=$((' + '(' * 30000 + '))\ntorchrun pretrain_sora.py', 'sum of whole numbers'),
        ('train.sh', ' ' * 100_001, 'bytes'),
        ('train.sh', 'torchrun pretrain_sora.py --lr 1', '--mm-model is missing'),
        ('train.sh', "torchrun pretrain_sora.py --lr 'open", 'cannot be read'),
        (
            'zero.yaml',
            'a0: &a0 [x: 1]\n'
            + ''.join(f'a{k + 1}: &a{k + 1} [{", ".join(["x: *a%d" % k] * 9)}]\n' for k in range(9)),  # noqa: UP031
            'more than 10000 fields',
        ),
        ('model.json', '[' * 100_000, 'model.json'),
        ('model.json', '[]', 'model.json'),
    ],
)
def test_hostile_files_end_at_once_in_one_sentence(tree, file, text, words):
    (tree / 'examples/wan' / file).write_text(text)
    said = mistake(from_mindspeed_mm, 'examples/wan/train.sh')
    assert words in said and file in said and '\n' not in said and len(said) < 500
