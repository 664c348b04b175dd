"""The commands as a user types them: the lines of MindSpeed-MM's quick start with smaller numbers, what goes wrong, and how fast help comes."""
import ast, json, os, re, shlex, shutil, subprocess, sys, time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mmkit
from mmkit.cli import mm_convert, mmkit as command

GOLDEN = Path(__file__).parent / 'golden'
HF = GOLDEN / 'qwen2_5_vl_hf'
HF_TO_MM = '''
mm-convert  Qwen2_5_VLConverter hf_to_mm \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [[4]] \\
  --cfg.parallel_config.vit_pp_layers [[3]] \\
  --cfg.parallel_config.tp_size 1
'''
MM_TO_HF = '''
mm-convert  Qwen2_5_VLConverter mm_to_hf \\
  --cfg.save_hf_dir "ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct" \\
  --cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.hf_config.hf_dir "ckpt/hf_path/Qwen2.5-VL-3B-Instruct" \\
  --cfg.parallel_config.llm_pp_layers [4] \\
  --cfg.parallel_config.vit_pp_layers [3] \\
  --cfg.parallel_config.tp_size 1
'''


def run(line, folder=None, code=0):
    "The finished process of a line in a shell; it must end with this exit code, and without a traceback."
    path = f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}'
    done = subprocess.run(['sh', '-c', line], cwd=folder, capture_output=True, text=True, env=os.environ | dict(PATH=path))
    assert done.returncode == code, done.stderr
    assert 'Traceback' not in done.stderr
    return done

def inside(line, capsys, code):
    "What a line of mm-convert says on stderr when it runs in this process; it must end with this exit code."
    try: ended = mm_convert(shlex.split(line.replace('\\\n', ' '))[1:])
    except SystemExit as end: ended = end.code
    said = capsys.readouterr()
    assert (ended, said.out) == (code, ''), said.err
    return said.err

def last(text): return text.strip().splitlines()[-1]

@pytest.fixture
def work(tmp_path, monkeypatch):
    "A folder as the quick start has it, with a small model; the test runs in it."
    monkeypatch.chdir(tmp_path)
    shutil.copytree(HF, tmp_path / 'ckpt' / 'hf_path' / 'Qwen2.5-VL-3B-Instruct')
    return tmp_path


def test_the_quick_starts_lines_do_what_they_did(work):
    assert last(run(HF_TO_MM, work).stdout) == 'wrote 66 tensors, 0.47 MB, in 1 file: ckpt/mm_path/Qwen2.5-VL-3B-Instruct'
    mine, golden = (torch.load(folder / 'release/mp_rank_00/model_optim_rng.pt', weights_only=True)['model'] for folder in (work / 'ckpt/mm_path/Qwen2.5-VL-3B-Instruct', GOLDEN / 'qwen2_5_vl_tp1'))
    assert mine.keys() == golden.keys() and all(torch.equal(mine[name], x) for name, x in golden.items())
    assert last(run(MM_TO_HF, work).stdout) == f'wrote {sum(len(load_file(file)) for file in HF.glob("*.safetensors"))} tensors, 0.47 MB, in 2 files: ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct'
    for file in HF.glob('*.safetensors'):
        old, new = load_file(file), load_file(work / 'ckpt/mm_to_hf/Qwen2.5-VL-3B-Instruct' / file.name)
        assert old.keys() == new.keys() and all(torch.equal(new[name], x) for name, x in old.items())


def test_both_forms_of_layers_do_in_both_directions_and_in_a_file(work):
    words = lambda line: shlex.split(line.replace('\\\n', ' ').replace('tp_size 1', 'tp_size 2'))[1:]
    assert mm_convert(words(HF_TO_MM.replace('[[4]]', '[1,3]').replace('[[3]]', '[3,0]'))) == 0
    assert mm_convert(words(MM_TO_HF.replace('[4]', '[[1,3]]').replace('[3]', '[[3,0]]'))) == 0
    (work / 'there.yaml').write_text('cfg:\n  mm_dir: again\n  hf_config: {hf_dir: ckpt/hf_path/Qwen2.5-VL-3B-Instruct}\n  parallel_config: {llm_pp_layers: [[1, 3]], vit_pp_layers: [3, 0], tp_size: 2}\n')
    assert mm_convert('Qwen2_5_VLConverter hf_to_mm --config there.yaml'.split()) == 0
    golden = {f.relative_to(GOLDEN / 'qwen2_5_vl_tp2_pp2') for f in (GOLDEN / 'qwen2_5_vl_tp2_pp2').rglob('*')}
    for folder in ('again', 'ckpt/mm_path/Qwen2.5-VL-3B-Instruct'): assert {f.relative_to(work / folder) for f in (work / folder).rglob('*')} == golden
    printed = run('mm-convert Qwen2_5_VLConverter hf_to_mm --config there.yaml --print_config', work).stdout
    assert 'mm_dir: again' in printed and 'tp_size: 2' in printed


@pytest.mark.parametrize('change, words', [
    (('hf_path', 'hf_pass'), 'ckpt/hf_pass/Qwen2.5-VL-3B-Instruct is not a folder'),
    (('[[4]]', '[[5]]'), 'llm_pp_layers [[5]] adds up to 5 but the model has 4'),
    (('[[3]]', '[[2]]'), 'vit_pp_layers [[2]] adds up to 2 but the model has 3'),
    (('tp_size 1', 'tp_size 4'), '2 groups of heads, which tp=4 does not divide'),
    (('tp_size 1', 'tp_size 0'), 'tp_size must be at least 1'),
    (('tp_size 1', 'tp_size 1 --cfg.save_vit_only true'), '--cfg.save_vit_only True is not possible'),
    (('tp_size 1', 'tp_size 2 --cfg.parallel_config.vit_tp_size 1'), '--cfg.parallel_config.vit_tp_size 1 is not possible'),
    (('tp_size 1', 'tp_size 1 --cfg.parallel_config.ep_size 2'), 'the model has no experts'),
    (('"ckpt/mm_path/Qwen2.5-VL-3B-Instruct"', '"ckpt"'), 'ckpt already holds something')])
def test_what_cannot_be_converted_is_one_sentence(change, words, work, capsys):
    said = inside(HF_TO_MM.replace(*change), capsys, code=1)
    assert len(said.strip().splitlines()) == 1 and said.startswith('mm-convert: ') and words in said
    assert [p.name for p in (work / 'ckpt').iterdir()] == ['hf_path']


@pytest.mark.parametrize('change, words', [
    (('[[4]]', '[[4]'), '[[4] is not a list of whole numbers'), (('mm_dir', 'mm_dirr'), '--cfg.mm_dirr'), (('tp_size 1', 'tp_size one'), 'tp_size'),
    (('hf_to_mm', 'mm_to_mm'), "invalid choice: 'mm_to_mm'"), (('Qwen2_5_VLConverter', 'BertConverter'), "invalid choice: 'BertConverter'"), (('--cfg.mm_dir "ckpt/mm_path/Qwen2.5-VL-3B-Instruct"', ''), 'cfg.mm_dir')])
def test_what_is_not_understood_is_one_line_with_code_2(change, words, work, capsys):
    said = inside(HF_TO_MM.replace(*change), capsys, code=2)
    assert len(said.strip().splitlines()) == 1 and words in said


def test_a_wrong_path_in_a_shell_is_one_sentence(work):
    for change, code in ((('hf_path', 'hf_pass'), 1), (('hf_dir', 'hf_pass'), 2)):
        said = run(HF_TO_MM.replace(*change), work, code)
        assert said.stdout == '' and len(said.stderr.strip().splitlines()) == 1 and 'hf_pass' in said.stderr


def test_fields_that_change_nothing_are_accepted(work):
    line = HF_TO_MM.replace('\\\n', ' ') + ' --cfg.trust_remote_code true --cfg.save_vit_only false --cfg.parallel_config.ep_size 1 --cfg.parallel_config.vit_tp_size 1 --cfg.parallel_config.audio_tp_size 0'
    assert mm_convert(shlex.split(line)[1:]) == 0


def test_help_names_every_field():
    said = run('mm-convert Qwen2_5_VLConverter mm_to_hf -h').stdout
    for field in ('save_hf_dir', 'mm_dir', 'hf_config.hf_dir', 'parallel_config.llm_pp_layers', 'parallel_config.vit_pp_layers', 'parallel_config.tp_size'): assert f'--cfg.{field}' in said
    for line in ('mm-convert -h', 'mm-convert Qwen2_5_VLConverter -h'): assert 'Qwen2_5_VLConverter' in run(line).stdout or 'hf_to_mm' in run(line).stdout


def test_mmkit_says_what_it_can_do_and_what_is_wrong(tmp_path):
    assert {'first-run', 'train', 'llava-to-mllm', 'chat'} <= set(re.findall(r'[\w-]+', run('mmkit --help').stdout))
    said = run('mmkit train nowhere.json layout.tp=2', tmp_path, code=1)
    assert said.stderr.startswith('mmkit: ') and 'nowhere.json' in said.stderr and len(said.stderr.strip().splitlines()) == 1
    for line in ('mmkit train config.json --rank 2', 'mmkit train config.json fast', 'mmkit chat folder question more', 'mmkit', 'mmkit sing'):
        assert last(run(line, tmp_path, code=2).stderr).startswith('mmkit')


def test_mmkit_hands_on_what_was_said(tmp_path, monkeypatch, capsys):
    from mmkit.config import Config, dumps
    (tmp_path / 'config.json').write_text(dumps(Config(weights='weights')))
    told = {}
    class Run:
        status, folder = 'done', 'here'
        def follow(self, print_line): print_line('step 1')
    def launch(config, ranks=None, folder=None): told.update(config=config, ranks=ranks, folder=folder); return Run()
    monkeypatch.setattr('mmkit.run.launch', launch)
    monkeypatch.setattr('mmkit.trainer.chat.chat', lambda folder, question, images=(): f'{folder} {question} {images}')
    monkeypatch.setattr('mmkit.first_run.first_run', lambda folder=None, ranks=2, seed=0, steps=400, say=print: say(f'{folder} {ranks} {seed} {steps}') or 'well')
    assert command(['train', str(tmp_path / 'config.json'), 'layout.tp=2', '--ranks', '4', '--run', 'there', 'loop.steps=3']) == 0
    assert (told['config'].layout.tp, told['config'].loop.steps, told['config'].weights, told['ranks'], told['folder']) == (2, 3, 'weights', 4, 'there')
    assert command(['chat', 'folder', '--image', 'a.jpg', 'What is this?', '--image', 'b.jpg']) == 0
    assert command(['first-run', '--run', 'x', '--steps', '5']) == 0
    assert capsys.readouterr().out.splitlines() == ['step 1', 'done: here', "folder What is this? ['a.jpg', 'b.jpg']", 'x 2 0 5', 'well']
    assert command(['train', str(tmp_path / 'config.json'), 'layout.tpp=2']) == 1 and 'tpp' in capsys.readouterr().err


def test_mmkit_converts_llava_and_names_what_it_drops(tmp_path):
    turns = [{'from': 'human', 'value': '<image>\nWhat is this?'}, {'from': 'gpt', 'value': 'A cat.'}]
    (tmp_path / 'llava.json').write_text(json.dumps([dict(id='1', image='cat.jpg', conversations=turns), dict(id='2', image='dog.jpg', conversations=turns)]))
    (tmp_path / 'pictures').mkdir()
    from PIL import Image
    Image.new('RGB', (8, 8)).save(tmp_path / 'pictures' / 'cat.jpg')
    assert 'kept 1 of 2' in run('mmkit llava-to-mllm llava.json mllm.json --images pictures', tmp_path).stdout
    assert len(json.loads((tmp_path / 'mllm.json').read_text())) == 1
    assert 'nowhere.json' in run('mmkit llava-to-mllm nowhere.json other.json --images pictures', tmp_path, code=1).stderr


def test_an_interrupted_or_failed_command_says_so(capsys):
    from mmkit.cli import finish
    from mmkit.ranks import RankFailed
    def raises(error):
        def command(): raise error
        return command
    assert [finish('mmkit', raises(error)) for error in (KeyboardInterrupt(), ValueError('no'), RankFailed(1, -9, 'out of memory'))] == [130, 1, 1]
    assert capsys.readouterr().err.splitlines()[:3] == ['mmkit: stopped', 'mmkit: no', 'mmkit: rank 1 failed (SIGKILL)']
    with pytest.raises(ZeroDivisionError): finish('mmkit', raises(ZeroDivisionError()))


def test_help_and_import_are_quick_and_import_nothing_heavy():
    heavy = {'torch', 'numpy', 'transformers', 'megatron', 'PIL', 'matplotlib', 'IPython'}
    for code in ('import mmkit; dir(mmkit); mmkit.Config; mmkit.load_config', 'import contextlib, io, mmkit.cli\nwith contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit): mmkit.cli.mmkit(["--help"])'):
        out = subprocess.run([sys.executable, '-c', code + '\nimport sys; print(*sys.modules)'], capture_output=True, text=True, check=True).stdout
        assert not heavy & set(out.split()), heavy & set(out.split())
    best = lambda code: min(timed(code) for _ in range(3))
    assert best('import mmkit') - best('pass') < 0.5

def timed(code):
    start = time.perf_counter()
    subprocess.run([sys.executable, '-c', code], check=True)
    return time.perf_counter() - start


@pytest.mark.parametrize('name', mmkit.NAMES)
def test_a_public_name_is_where_the_table_says_and_no_module_hides_it(name):
    package = Path(mmkit.__file__).parent
    tree = ast.parse((package.parent / mmkit.NAMES[name].replace('.', '/')).with_suffix('.py').read_text())
    assert name in next(ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign) and node.targets[0].id == '__all__')
    assert not (package / f'{name}.py').exists() and not (package / name).exists()

def test_an_unknown_public_name_lists_the_known_ones():
    with pytest.raises(AttributeError, match='Config.*Layout'): mmkit.Layot
    assert set(mmkit.NAMES) <= set(dir(mmkit)) and re.fullmatch(r'\d+\.\d+\.\d+', mmkit.__version__)
