"""Files of strangers, sent through every reader: no code runs, each ends in one sentence that names the file,
at once and in little memory.
"""

import gc
import io
import json
import os
import pickle
import resource
import shutil
import struct
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import kill_test
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmkit.cli import finish, mm_convert
from mmkit.config import Loop, Optim
from mmkit.converters.folders import HFFolder, MMFolder, load_megatron_file, open_weights
from mmkit.converters.qwen2_5_vl import qwen2_5_vl_towers
from mmkit.converters.wan2_1 import wan2_1_towers
from mmkit.core.files import STATE, load_json, write_manifest
from mmkit.datasets.features import Features, read_pt, read_tensors
from mmkit.mindspeed_mm.convert import Lora, convert_qwen, convert_wan
from mmkit.trainer.checkpoint import find_start
from mmkit.trainer.loop import fit

GOLDEN = Path(__file__).parent / 'golden'
HF, WAN = GOLDEN / 'qwen2_5_vl_hf', GOLDEN / 'wan2_1_t2v_hf'
CONFIG, WAN_CONFIG = (json.loads((folder / 'config.json').read_text()) for folder in (HF, WAN))


class Payload:
    "Writes a file when somebody unpickles it."

    def __init__(self, how=os.system):
        self.how = how

    def __reduce__(self):
        return {
            os.system: (os.system, ('touch was_here',)),
            eval: (eval, ("open('was_here', 'w')",)),
            open: (io.open, ('was_here', 'w')),
        }[self.how]


def refused(read, file, limit=200e6, time_limit=2):
    """`read` raises one ValueError of one line that names `file`, in a second and little memory, and nothing
    was run.
    """
    gc.collect()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(ValueError) as caught:
        read()
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    said = str(caught.value)
    assert Path(file).name in said and '\n' not in said and len(said) < 1000, said
    assert seconds < time_limit and grown < limit, (seconds, grown)
    assert not Path('was_here').exists()


def ends(command, file, capsys):
    "A command ends with code 1 and one line that names `file`, and leaves nothing."
    capsys.readouterr()
    code = finish('mm-convert', command)
    said = [line for line in capsys.readouterr().err.splitlines() if line.strip() and 'B/s' not in line]
    assert code == 1 and len(said) == 1 and Path(file).name in said[0] and not Path('was_here').exists(), (
        code,
        said,
    )
    assert not Path('out').exists() and not list(Path().glob('.*partial'))


def qwen(method, mm='mm', hf=HF, target='out'):
    "What mm-convert does when it has understood its line."
    layout = SimpleNamespace(llm_pp_layers=[4], vit_pp_layers=[3], tp_size=1)
    folders = dict(mm_dir=target) if method == 'hf_to_mm' else dict(mm_dir=mm, save_hf_dir=target)
    return lambda: convert_qwen(
        method, SimpleNamespace(**folders, hf_config=SimpleNamespace(hf_dir=str(hf)), parallel_config=layout)
    )


def wan(method, source, hf=None):
    return lambda: convert_wan(method, source, 'out', hf)


def with_adapters(folder):
    "The four conversions that merge the adapters of a folder into good weights."
    layout = SimpleNamespace(llm_pp_layers=[4], vit_pp_layers=[3], tp_size=1)
    hf = SimpleNamespace(hf_dir=str(HF))
    base = dict(
        mm_dir=GOLDEN / 'qwen2_5_vl_tp1',
        source_dir=GOLDEN / 'qwen2_5_vl_tp1',
        save_hf_dir='out',
        target_dir='out',
        hf_config=hf,
        parallel_config=layout,
    )
    lora = Lora(folder, 16.0)
    for method in ('mm_to_hf', 'merge_lora_to_base'):
        yield lambda: convert_qwen(method, SimpleNamespace(**base), lora=lora)
        yield lambda: convert_wan(method, GOLDEN / 'wan2_1_t2v_pp1', 'out', WAN, lora=lora)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def zipped(file, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(file, 'w', compression) as archive:
        for name, content in entries:
            archive.writestr(name, content)


def saved(content, **settings):
    torch.save(content, buffer := io.BytesIO(), **settings)
    return buffer.getvalue()


def entries_of(content):
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def script(file):
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(2)), str(file))


MODEL = dict(model={'weight': torch.arange(4.0)})


def wide(x):
    return dict(model={'weight': x})


PT = {
    'a payload, raw': lambda file: file.write_bytes(pickle.dumps(Payload())),
    'a payload among the weights': lambda file: torch.save(dict(model={'weight': Payload()}), file),
    'a payload beside the weights': lambda file: torch.save(MODEL | dict(args=Payload(eval)), file),
    'a payload in the old format': lambda file: torch.save(
        MODEL | dict(args=Payload(open)), file, _use_new_zipfile_serialization=False
    ),
    'a payload in a zip by hand': lambda file: zipped(
        file, [('a/data.pkl', pickle.dumps(Payload(), 2)), ('a/version', b'3\n'), ('a/byteorder', b'little')]
    ),
    'a program': script,
    'a zip bomb': lambda file: zipped(file, [('a/data.pkl', bytes(120_000_000))], zipfile.ZIP_DEFLATED),
    'compressed weights': lambda file: zipped(
        file,
        [(name, bytes(len(data)) if 'data/0' in name else data) for name, data in entries_of(MODEL)],
        zipfile.ZIP_DEFLATED,
    ),
    'a name that leads out': lambda file: zipped(file, [*entries_of(MODEL), ('../../was_here', b'x')]),
    'an absolute name': lambda file: zipped(file, [*entries_of(MODEL), ('/tmp/was_here', b'x')]),
    'a cut end': lambda file: file.write_bytes(saved(MODEL)[:-100]),
    'a cut middle': lambda file: file.write_bytes(
        (whole := saved(wide(torch.zeros(5000))))[:2000] + whole[-2000:]
    ),
    'nothing': lambda file: file.write_bytes(b''),
    'noise': lambda file: file.write_bytes(os.urandom(5000)),
    'a folder': lambda file: file.mkdir(),
    'a shape of 10^12 numbers': lambda file: torch.save(wide(torch.zeros(1).expand(10**6, 10**6)), file),
    'a sparse tensor': lambda file: torch.save(wide(torch.sparse_coo_tensor([[0]], [1.0], (10**9,))), file),
    'a list': lambda file: torch.save([torch.zeros(2)], file),
    'a model that is a tensor': lambda file: torch.save(dict(model=torch.zeros(2)), file),
    'names that are numbers': lambda file: torch.save(dict(model={1: 'x'}), file),
}


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('what', PT)
def test_a_hostile_pt_file_is_refused_by_every_reader(what, here, capsys):
    for path in ('mm/release/mp_rank_00', 'adapters/iter_0000020/mp_rank_00', 'features'):
        Path(path).mkdir(parents=True)
    rank = Path('mm/release/mp_rank_00/model_optim_rng.pt')
    adapter = Path('adapters/iter_0000020/mp_rank_00/model_optim_rng.pt')
    feature = Path('features/clip.pt')
    Path('mm/latest_checkpointed_iteration.txt').write_text('release')
    Path('adapters/latest_checkpointed_iteration.txt').write_text('20')
    Path('data.jsonl').write_text(json.dumps(dict(path='clip.mp4', cap='a clip', file='features/clip.pt')))
    for file in (rank, adapter, feature):
        PT[what](file)
    for towers in (qwen2_5_vl_towers(CONFIG), wan2_1_towers(WAN_CONFIG)):
        for read in (lambda: MMFolder('mm', towers), lambda: open_weights('mm', towers)):
            refused(read, rank)
    if what not in (
        'a shape of 10^12 numbers',
        'a sparse tensor',
        'a model that is a tensor',
        'names that are numbers',
    ):
        refused(lambda: load_megatron_file(rank), rank)
    refused(lambda: read_pt(feature), feature)
    refused(lambda: Features('.'), feature)
    ends(wan('mm_to_hf', 'mm', WAN), rank, capsys)
    ends(qwen('mm_to_hf'), rank, capsys)
    for merge in with_adapters('adapters'):
        ends(merge, 'adapters', capsys)
    if what != 'a payload among the weights':
        return
    # and once from the words of the line
    assert (
        mm_convert(
            f'WanConverter resplit --cfg.source_path mm --cfg.target_path out --cfg.hf_dir {WAN}'.split()
        )
        == 1
    )
    assert rank.name in capsys.readouterr().err and not Path('was_here').exists() and not Path('out').exists()
    assert (
        mm_convert(
            f'WanConverter mm_to_hf --cfg.source_path {GOLDEN / "wan2_1_t2v_pp1"} --cfg.target_path out'
            f' --cfg.hf_dir {WAN} --cfg.lora_path adapters --lora_alpha 16'.split()
        )
        == 1
    )
    assert (
        str(adapter) in capsys.readouterr().err and not Path('was_here').exists() and not Path('out').exists()
    )


def header(table, data=b'', size=None):
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return struct.pack('<q', len(text) if size is None else size) + text + data


def tensor(start, end, shape=(4,), dtype='U8'):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[start, end])


SAFETENSORS = {
    'nothing': b'',
    'a cut header': header({'a': tensor(0, 4)})[:20],
    'cut data': header({'a': tensor(0, 4)}, b'ab'),
    'a header of 500 MB': header(b'{}', size=500_000_000),
    'a header of -5 bytes': header(b'{}', size=-5),
    'a header of 2^63 - 1 bytes': header(b'{}', size=2**63 - 1),
    'overlapping tensors': header({'a': tensor(0, 4), 'b': tensor(2, 6)}, bytes(6)),
    'a tensor outside': header({'a': tensor(0, 1 << 40, (1 << 40,))}, bytes(4)),
    'offsets that go back': header({'a': tensor(4, 0)}, bytes(4)),
    'negative offsets': header({'a': tensor(-4, 0)}, bytes(4)),
    'a gap': header({'a': tensor(2, 6)}, bytes(6)),
    'a shape that overflows': header({'a': tensor(0, 4, (1 << 62, 8))}, bytes(4)),
    'a shape of -1': header({'a': tensor(0, 4, (-1,))}, bytes(4)),
    'a shape of NaN': header(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
    'an unknown number format': header({'a': tensor(0, 4, (4,), 'P64')}, bytes(4)),
    'a number format that torch has and weights have not': header(
        {'a': tensor(0, 4, (4,), 'F8_E8M0')}, bytes(4)
    ),
    'a deep header': header(b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}'),
    'a header that is a list': header(b'[1]'),
    'a pickle': pickle.dumps(Payload()),
    'a name twice': header(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    'a folder': None,
}


@pytest.mark.parametrize('what', SAFETENSORS)
def test_a_hostile_safetensors_file_is_refused_by_every_reader(what, here, capsys):
    for folder, config in (('hf', HF), ('wan', WAN)):
        file = Path(folder) / 'model.safetensors'
        Path(folder).mkdir()
        shutil.copyfile(config / 'config.json', Path(folder) / 'config.json')
        if SAFETENSORS[what] is None:
            file.mkdir()
        else:
            file.write_bytes(SAFETENSORS[what])
        # the reader of the format keeps one; no model has a tensor of this name
        names = what == 'a name twice'
        if not names:
            refused(lambda: HFFolder(folder), file)
        if not names:
            refused(lambda: open_weights(folder, ()), file)
        if not names and 'number format that torch' not in what:
            refused(lambda: read_tensors(file), file)
    ends(qwen('hf_to_mm', hf='hf'), 'weights do not fit' if names else file, capsys)
    ends(wan('hf_to_mm', 'wan'), 'weights do not fit' if names else file, capsys)


JSON = {
    'a list': b'[]',
    'a number': b'1',
    'cut': b'{"a": 1',
    'deep': b'[' * 200_000 + b']' * 200_000,
    'no text': b'\xff\xfe\x00',
    'nothing': b'',
    'a pickle': pickle.dumps(Payload()),
    'a number of a million digits': b'{"hidden_size": ' + b'9' * 1_000_000 + b'}',
    'a folder': None,
}
SIZES = {
    'hidden_size': ['NaN', '-1', '0', '1e400', '"64"', '[64]', '1' + '0' * 30],
    'num_hidden_layers': ['1000000000', 'true'],
    'num_attention_heads': ['0'],
    'vision_config': ['[]', '"x"', '{"depth": 1000000000}', '{"depth": NaN}'],
}
WAN_SIZES = {
    'num_layers': ['1000000000', 'NaN', '-4'],
    'num_attention_heads': ['0', '1e9'],
    'patch_size': ['3', '[1, 0, 2]', '[1, 2, 1e9]', '"122"'],
    'image_dim': ['"x"', 'NaN', '-1'],
}


@pytest.mark.parametrize('what', JSON)
def test_hostile_json_is_refused_by_every_reader(what, here, capsys):
    for name in ('hf', 'wan', 'indexed'):
        shutil.copytree({'wan': WAN}.get(name, HF), name)
    indexed = Path('indexed/model.safetensors.index.json')
    for file in (Path('hf/config.json'), Path('wan/config.json'), indexed):
        file.unlink()
        if JSON[what] is None:
            file.mkdir()
        else:
            file.write_bytes(JSON[what])
    if what not in ('a list', 'a number', 'a number of a million digits'):
        refused(lambda: load_json('hf/config.json'), 'config.json')
    refused(lambda: HFFolder('indexed'), indexed)
    refused(lambda: HFFolder('hf'), 'config.json')
    ends(qwen('hf_to_mm', hf='hf'), 'config.json', capsys)
    ends(wan('hf_to_mm', 'wan'), 'config.json', capsys)


@pytest.mark.parametrize(
    'folder, name, value',
    [
        (folder, name, value)
        for folder, table in ((HF, SIZES), (WAN, WAN_SIZES))
        for name, values in table.items()
        for value in values
    ],
)
def test_a_size_that_no_model_has_is_refused(folder, name, value, here, capsys):
    shutil.copytree(folder, 'hf')
    config = json.loads((folder / 'config.json').read_text())
    Path('hf/config.json').write_text(json.dumps(config | {name: 'HERE'}).replace('"HERE"', value))
    start = time.perf_counter()
    ends(qwen('hf_to_mm', hf='hf') if folder is HF else wan('hf_to_mm', 'hf'), 'config.json', capsys)
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    'name', ['../../secret.safetensors', '/etc/passwd', '..', '', 'sub/model.safetensors', 7, None]
)
def test_no_index_leads_out_of_its_folder(name, here):
    shutil.copytree(HF, 'hf')
    shutil.copyfile(next(HF.glob('*.safetensors')), 'secret.safetensors')
    index = Path('hf/model.safetensors.index.json')
    held = json.loads(index.read_text())
    index.write_text(json.dumps(held | dict(weight_map=dict.fromkeys(held['weight_map'], name))))
    refused(lambda: HFFolder('hf'), 'hf')


def test_links_lead_nowhere_but_into_the_blobs_of_a_cache(here, capsys):
    """Hugging Face's cache keeps files as blobs/HASH and links to them from snapshots/REVISION.

    Any other link out of a folder is refused: what it names would be copied.
    """
    cache = Path('hub/models--a--b')
    snapshot = cache / 'snapshots' / 'main'
    for path in (snapshot, cache / 'blobs'):
        path.mkdir(parents=True)
    for k, file in enumerate(HF.iterdir()):
        shutil.copyfile(file, cache / 'blobs' / str(k))
        (snapshot / file.name).symlink_to(f'../../blobs/{k}')
    qwen('hf_to_mm', hf=snapshot, target='mm')()
    Path('secret.txt').write_text('secret')
    for name in (
        'notes.txt',
        'config.json',
        next(HF.glob('*.safetensors')).name,
        'model.safetensors.index.json',
    ):
        shutil.rmtree('hf', ignore_errors=True)
        shutil.copytree(HF, 'hf')
        (file := Path('hf') / name).unlink(missing_ok=True)
        shutil.copyfile(HF / name, f'copy-{name}') if (HF / name).exists() else None
        file.symlink_to(Path(f'copy-{name}' if (HF / name).exists() else 'secret.txt').absolute())
        ends(qwen('mm_to_hf', hf='hf'), name, capsys)
    shutil.move('mm/release/mp_rank_00', 'elsewhere')
    Path('mm/release/mp_rank_00').symlink_to(Path('elsewhere').absolute())
    ends(qwen('mm_to_hf'), 'model_optim_rng.pt', capsys)


@pytest.mark.parametrize(
    'word',
    [b'', b'../../x', b'-1', b'9' * 5000, '²'.encode(), b'\xff', b'release\nrelease', b'1' * 10_000_000],
)
def test_a_hostile_latest_file_is_refused(word, here):
    shutil.copytree(GOLDEN / 'qwen2_5_vl_tp1', 'mm')
    Path('mm/latest_checkpointed_iteration.txt').write_bytes(word)
    refused(lambda: MMFolder('mm', qwen2_5_vl_towers(CONFIG)), 'latest_checkpointed_iteration.txt')


# Checkpoints of a stranger, with a manifest that fits


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "The config of a small training of two steps, and its checkpoints."
    folder = tmp_path_factory.mktemp('trained')
    kill_test.write_text(folder)
    config = kill_test.text_config(folder, Optim(lr=1e-3), Loop(steps=3, global_batch=2, save_every=1))
    fit(replace(config, loop=replace(config.loop, steps=2)), folder / 'run')
    return config, folder / 'run' / 'checkpoints'


def goes_on(config, checkpoints, change):
    """A new run that goes on from a copy of the first checkpoint with `change(folder)` and a manifest that
    fits.
    """
    for old in ('run', 'step-0000001'):
        shutil.rmtree(old, ignore_errors=True)
    folder = Path(shutil.copytree(checkpoints / 'step-0000001', 'step-0000001'))
    change(folder)
    write_manifest(folder)
    return lambda: fit(replace(config, resume=str(folder)), 'run')


def noticed(read, file, what):
    "Nothing, or in a list what `read` does instead of refusing the file."
    try:
        refused(read, file, time_limit=60)
    except (Exception, pytest.fail.Exception) as error:
        return [f'{what}: {type(error).__name__} {" ".join(str(error).split())[:200]}']
    return []


STATES = {
    'a list': b'[]',
    'a number': b'1',
    'null': b'null',
    'nothing': b'',
    'cut': b'{"step": 1',
    'deep': b'[' * 200_000 + b']' * 200_000,
    'no text': b'\xff\xfe\x00',
    'a pickle': pickle.dumps(Payload()),
}
FIELDS = {
    'step': ['x', None, True, 1.5, -1, 0, 2, 10**30, [1]],
    'adam_steps': ['x', None, -1, 1.5, 10**30],
    'average_steps': ['x', -1, 10**30],
    'optimizer': ['x', None],
    'frozen': ['vision', None, 7],
    'ledger': [None, 'x', [], {'stranger': 1}],
}


@pytest.mark.parametrize('what', STATES)
def test_a_state_that_is_no_state_is_refused(what, trained, here):
    refused(
        goes_on(*trained, lambda folder: (folder / STATE).write_bytes(STATES[what])), STATE, time_limit=60
    )


@pytest.mark.parametrize('name', FIELDS)
def test_a_state_with_a_field_that_no_training_writes_is_refused(name, trained, here):
    "Each field with another kind of value or one that cannot be, and without it."

    def change(value):
        def write(folder):
            state = {key: x for key, x in load_json(folder / STATE).items() if key != name}
            (folder / STATE).write_text(json.dumps(state if value is ... else state | {name: value}))

        return write

    wrong = [
        words
        for value in (..., *FIELDS[name])
        for words in noticed(goes_on(*trained, change(value)), STATE, f'{name}={value!r}')
    ]
    assert not wrong, '\n'.join(wrong)


def other(change):
    "Gives the first tensor of a file in a checkpoint another value."

    def write(file):
        tensors = load_file(file)
        name = max(tensors, key=lambda name: tensors[name].numel())
        save_file(tensors | change(name, tensors[name]), file)

    return write


MOMENTS = {
    'a wrong shape': other(lambda name, x: {name: x[:-1].contiguous()}),
    'another order of dims': other(lambda name, x: {name: x.T.contiguous()}),
    'one number': other(lambda name, x: {name: x.flatten()[:1].clone()}),
    'one row': other(lambda name, x: {name: x[:1].clone()}),
    'no numbers': other(lambda name, x: {name: x[:0].clone()}),
    'whole numbers': other(lambda name, x: {name: x.long()}),
    'yes and no': other(lambda name, x: {name: x > 0}),
    'a stranger': other(lambda name, x: {'stranger.weight': x[:1].clone()}),
    **{
        what: lambda file, what=what: file.write_bytes(SAFETENSORS[what])
        for what in (
            'nothing',
            'cut data',
            'a header of 2^63 - 1 bytes',
            'a shape that overflows',
            'overlapping tensors',
            'a pickle',
        )
    },
}


@pytest.mark.parametrize('kind', ['exp_avg', 'exp_avg_sq'])
def test_moments_that_no_training_writes_are_refused(kind, trained, here):
    file = f'training/optimizer-{kind}-00001-of-00002.safetensors'
    wrong = [
        words
        for what, change in MOMENTS.items()
        for words in noticed(goes_on(*trained, lambda folder: change(folder / file)), file, what)
    ]
    assert not wrong, '\n'.join(wrong)


LOOPS = [
    'vocab.json',
    'config.json',
    'manifest.json',
    STATE,
    'model-00001-of-00002.safetensors',
    'training/optimizer-exp_avg-00001-of-00002.safetensors',
    'training',
]


@pytest.mark.parametrize('name', LOOPS)
def test_a_link_to_itself_in_a_checkpoint_is_named_and_the_one_before_taken(name, trained, here):
    config, checkpoints = trained
    shutil.copytree(checkpoints, 'run/checkpoints')
    loop, said = Path('run/checkpoints/step-0000002', name), []
    shutil.rmtree(loop) if loop.is_dir() else loop.unlink()
    loop.symlink_to(loop.name)
    refused(lambda: find_start(replace(config, resume=2), Path('run'), said.append), name)
    assert (
        find_start(config, Path('run'), said.append) == Path('run/checkpoints/step-0000001')
        and name in said[0]
    ), said


@pytest.mark.parametrize(
    'name', ['vocab.json', 'config.json', 'model.safetensors.index.json', next(HF.glob('*.safetensors')).name]
)
def test_a_link_to_itself_in_a_model_is_named(name, here, capsys):
    shutil.copytree(HF, 'hf')
    (loop := Path('hf', name)).unlink(missing_ok=True)
    loop.symlink_to(loop.name)
    refused(lambda: HFFolder('hf'), loop)
    for command in (qwen('hf_to_mm', hf='hf'), qwen('mm_to_hf', mm=GOLDEN / 'qwen2_5_vl_tp1', hf='hf')):
        ends(command, loop, capsys)
