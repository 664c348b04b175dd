"""The house rules, checked by machine.

Each rule is a function of a folder that yields one sentence per violation.

Every rule is tested twice: the project keeps it, and a small house with one planted violation is caught by
it.
"""

import ast
import base64
import builtins
import dis
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import readme

ROOT = Path(__file__).resolve().parent.parent
TOP = {
    'nbs',
    'mmkit',
    'tests',
    '.ci',
    'settings.ini',
    'setup.py',
    'constraints.txt',
    'MANIFEST.in',
    'README.md',
    'README_zh.md',
    'LICENSE',
    'CHANGELOG.md',
    'CONTRIBUTING.md',
    '.gitignore',
    '.pre-commit-config.yaml',
    'ruff.toml',
    '.gitattributes',
}
# words that are gone, and those in their place
BANNED = {
    r'films?': 'video',
    r'filmed': 'generated',
    r'studio': 'pipeline object',
    r'survey': 'statistics',
    r'forecast': 'estimate',
    r'copies of the model': 'data-parallel replicas',
    r'last words': 'traceback',
    r'made again': 'recomputed',
    r'dealt out': 'distributed',
    r'near_and_rest': 'split_high_low',
    r'turn_pairs': 'apply_rotary_interleaved',
    r'peer(files|fields)': 'mindspeed_mm',
    r'optim\.decay': 'optim.schedule',
    r'loop\.average': 'loop.ema',
}
# what MindSpeed-MM calls things, and commands: tables, to be divided
LARGE_MODULES = {
    'mindspeed_mm.fields': 620,
    'mindspeed_mm.convert': 540,
    'cli': 480,
    'launcher.hosts': 470,
    'toy.qwen': 470,
}
NPU_MODULES = {'core.device', 'parallel.engine', 'parallel.attention', 'parallel.layers'}
ENVIRONMENT_MODULES = {'core.device', 'core.ranks', 'launcher.run'}
# stand in mmkit itself, whatever folder their notebooks are in
TOP_MODULES = {'config', 'cli'}
LATE = ('transformers', 'diffusers', 'megatron', 'decord', 'av', 'PIL', 'matplotlib', 'ipywidgets', 'IPython')
PICTURE_LIMIT, NOTEBOOK_LIMIT = 100_000, 500_000


# Reading a house


def files(root):
    "The files git knows or would add; in a folder without git, every file."
    if not (root / '.git').exists():
        return sorted(p for p in root.rglob('*') if p.is_file() and '__pycache__' not in p.parts)
    names = subprocess.run(
        ['git', 'ls-files', '-co', '--exclude-standard', '-z'],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split('\0')
    return sorted(root / n for n in set(names) if n and (root / n).is_file())


def notebooks(root):
    "(path, cells) of every notebook of the house, in order."
    for p in files(root):
        if p.suffix == '.ipynb':
            yield p, json.loads(p.read_text(encoding='utf-8'))['cells']


def library(root):
    return ((p, cells) for p, cells in notebooks(root) if place_of(p) is not None)


def tutorials(root):
    return ((p, cells) for p, cells in notebooks(root) if p.parent.name == 'tutorials')


def place_of(path):
    "(number of its folder, its own number) of a library notebook; None for any other."
    folder, own = re.match(r'(\d)_', path.parent.name), re.match(r'(\d\d)_', path.name)
    return (int(folder[1]), int(own[1])) if folder and own else None


def module_of(path):
    """The module that a library notebook exports: its folder's package and its name.

    In `9_tools` the name says the package, too.
    """
    name = re.sub(r'^\d+_', '', path.stem)
    return (
        name if '.' in name or name in TOP_MODULES else f'{re.sub(r"^[0-9]_", "", path.parent.name)}.{name}'
    )


def source(cell):
    return ''.join(cell['source'])


def directives(cell):
    return re.findall(r'^#\s*\|\s*(.+?)\s*$', source(cell), re.M) if cell['cell_type'] == 'code' else []


def exported(cell):
    return any(re.match(r'exports?i?\b', d) for d in directives(cell))


def length(text):
    return sum(1 for line in text.split('\n') if line.strip() and not re.match(r'\s*#\s*\|', line))


def place(path, cell):
    return (
        f'{path.name}, cell `{next((line[:60] for line in source(cell).split(chr(10)) if length(line)), "")}`'
    )


def python(cell):
    "The cell as a syntax tree, magics left out; None when it is in another language."
    text = source(cell)
    if re.match(r'%%(?!ranks|torchrun|time|capture|prun)', text.lstrip()):
        return None
    return ast.parse(re.sub(r'^(\s*)[%!?]{1,2}(?=[A-Za-z]).*$', r'\1pass', text, flags=re.M))


def trees(root):
    "(where, tree) of every Python cell of every notebook and of every module and test."
    for p, cells in notebooks(root):
        for c in cells:
            if c['cell_type'] == 'code' and (tree := python(c)):
                yield place(p, c), tree
    for p in files(root):
        if p.suffix == '.py':
            yield p.relative_to(root).as_posix(), ast.parse(p.read_text(encoding='utf-8'))


def modules(root):
    """(dotted name without mmkit, text) of every module, the generated index left out.

    A package's own file is called `__init__`.
    """
    for p in files(root):
        name = p.relative_to(root).with_suffix('').parts
        if p.suffix == '.py' and name[0] == 'mmkit' and p.name != '_modidx.py':
            yield '.'.join(name[1:]), p.read_text(encoding='utf-8')


def definitions(tree):
    return (n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)))


def public(tree):
    return (
        n
        for n in tree.body
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not n.name.startswith('_')
    )


def docstring_lines(tree):
    "The numbers of the lines that docstrings stand on."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)
    texts = [n.body[0] for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n) is not None]
    return {number for text in texts for number in range(text.lineno, text.end_lineno + 1)}


def code_lines(node, text):
    "How many lines of code a module or a definition in it has."
    lines, left_out = text.split('\n'), docstring_lines(node)
    span = range(getattr(node, 'lineno', 1), getattr(node, 'end_lineno', len(lines)) + 1)
    code = [lines[n - 1].strip() for n in span if n not in left_out]
    return sum(1 for line in code if line and not line.startswith('#'))


def imported(tree, absolute=False):
    "Every dotted name that the tree imports; `from a import b` gives a.b."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from (a.name for a in n.names)
        if isinstance(n, ast.ImportFrom) and not (absolute and n.level):
            yield from (f'{n.module or ""}.{a.name}' for a in n.names)


# The rules


def order(root):
    """A notebook imports only lower folders and lower numbers of its own, no number is used twice in a
    folder, and models, converters and datasets do not import each other.
    """
    places = [place_of(p) for p, _ in library(root)]
    numbers = {f'mmkit.{module_of(p)}': place_of(p) for p, _ in library(root)}
    for twice in sorted({place for place in places if places.count(place) > 1}):
        yield f'folder {twice[0]} has two notebooks of number {twice[1]}'
    for p, cells in notebooks(root):
        own, wanted = place_of(p), set()
        for c in cells:
            if c['cell_type'] != 'code':
                continue
            wanted |= set(re.findall(r'^%load_ext (mmkit\S*)', source(c), re.M)) | set(
                imported(python(c) or ast.parse(''))
            )
        for name in sorted(w for w in wanted if w.split('.')[0] == 'mmkit'):
            found = next((m for m in (name, name.rpartition('.')[0]) if m in numbers), None)
            if own is None:
                continue
            if found is None:
                yield f'{p.name} imports {name}, which no numbered notebook exports'
            elif numbers[found] >= own and found != f'mmkit.{module_of(p)}':
                yield (
                    f'{p.name} imports {found}, folder {numbers[found][0]}, number {numbers[found][1]}: only'
                    ' lower numbers may be imported'
                )
            elif {own[0], numbers[found][0]} <= {3, 4, 5} and own[0] != numbers[found][0]:
                yield f'{p.name} imports {found}: folders 3, 4 and 5 do not import each other'


def own_name(root):
    "A numbered notebook exports the module that its file name says, and has one exported import cell."
    for p, cells in library(root):
        names = [d.split()[1] for c in cells for d in directives(c) if d.startswith('default_exp ')]
        if names != [module_of(p)]:
            yield f'{p.name} has default_exp {names}, not {module_of(p)}'
        importing = [
            c
            for c in cells
            if exported(c) and any(isinstance(n, (ast.Import, ast.ImportFrom)) for n in python(c).body)
        ]
        for c in importing[1:]:
            yield f'{place(p, c)}: a second exported import cell; imports stand in one cell at the top'


def undefined_names(root):
    "Nothing exported uses a name that only an unexported cell defines."
    for name, text in modules(root):
        module = compile(text, name, 'exec', dont_inherit=True)
        codes = [module]
        for c in codes:
            codes += [k for k in c.co_consts if isinstance(k, types.CodeType)]

        def stored(c, *ops):
            return {i.argval for i in dis.get_instructions(c) if i.opname in ops}

        known = (
            stored(module, 'STORE_NAME')
            | {n for c in codes for n in stored(c, 'STORE_GLOBAL')}
            | set(dir(builtins))
        )
        for c in codes:
            used = stored(c, 'LOAD_GLOBAL', 'LOAD_NAME', 'LOAD_FROM_DICT_OR_GLOBALS')
            for lost in sorted(
                n
                for n in used - known - stored(c, 'STORE_NAME') - set(c.co_varnames)
                if not n.startswith('__')
            ):
                yield f'mmkit.{name} uses {lost}, which it never defines'


def sizes(root):
    """Functions of 40 lines, modules of 400, functions in tutorials of 8, exported lines of 110 columns.

    Blank lines, comments and docstrings are not counted; code is formatted. Modules that hold a table of what
    another program calls things may be as long as the table.
    """
    for p, cells in tutorials(root):
        for c in cells:
            tree = python(c) if c['cell_type'] == 'code' else None
            for f in definitions(tree or ast.parse('')):
                if (n := code_lines(f, source(c))) > 8:
                    yield f'{p.name}: {f.name} has {n} lines; a tutorial holds no logic, 8 are allowed'
    for name, text in modules(root):
        tree = ast.parse(text)
        allowed = LARGE_MODULES.get(name, 400)
        if (n := code_lines(tree, text)) > allowed:
            yield f'mmkit.{name}: {n} lines of code; {allowed} are allowed'
        for f in definitions(tree):
            if (n := code_lines(f, text)) > 40:
                yield f'mmkit.{name}: {f.name} has {n} lines; 40 are allowed'


def star_imports(root):
    "No `import *`."
    for where, tree in trees(root):
        for name in imported(tree):
            if name.endswith('.*'):
                yield f'{where}: import *'


def bare_excepts(root):
    "No `except:` without the names of the errors it expects."
    for where, tree in trees(root):
        for n in ast.walk(tree):
            if isinstance(n, ast.ExceptHandler) and n.type is None:
                yield f'{where}: line {n.lineno}, bare except'


def class_names(root):
    "No Manager, Helper, Utils, Base, Handler."
    for name, text in modules(root):
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, ast.ClassDef) and re.search(r'(Manager|Helper|Utils?|Base|Handler)$', n.name):
                yield f'mmkit.{name}: class {n.name} has no home yet'
        if re.search(r'(^|[._])(utils?|helpers?|misc|common)$', name):
            yield f'mmkit.{name}: a module with no home'


def npu_words(root):
    "torch_npu and hccl stand only in the device, the engine and the fused operations."
    for name, text in modules(root):
        if name not in NPU_MODULES and (word := re.search(r'torch_npu|hccl', text, re.I)):
            yield f'mmkit.{name} says {word[0]}'


def one_path(root):
    """A model does not ask how it is laid out: no word of the world's size, no comparison of an axis.

    What is counted before there is a model (costs, shapes) may.
    """
    axes = {'tp', 'pp', 'cp', 'vpp', 'dp', 'dp_cp', 'ulysses', 'ring'}

    def last(n):
        return getattr(n, 'attr', getattr(n, 'id', ''))

    def sizes(n):
        return isinstance(n, ast.Attribute) and (
            (n.attr == 'size' and last(n.value) in axes | {'axis'})
            or (n.attr in axes and last(n.value) == 'layout')
        )

    for name, text in modules(root):
        if not name.startswith('models.') or name in ('models.costs', 'models.shapes'):
            continue
        for n in ast.walk(ast.parse(text)):
            if isinstance(n, (ast.Name, ast.Attribute)) and 'world' in (word := last(n)):
                yield f'mmkit.{name}, line {n.lineno}, says {word}'
            if isinstance(n, ast.Compare) and any(map(sizes, (n.left, *n.comparators))):
                yield f'mmkit.{name}, line {n.lineno}, compares the size of an axis'


def environment(root):
    "The environment is read only where a process begins."
    for name, text in modules(root):
        if name in ENVIRONMENT_MODULES:
            continue
        tree = ast.parse(text)
        seen = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)} | {
            n.split('.')[-1] for n in imported(tree)
        }
        for word in sorted(seen & {'environ', 'environb', 'getenv', 'putenv'}):
            yield f'mmkit.{name} reads {word}'


def required(root):
    """What the library imports stands in settings.ini.

    So does what its notebooks import, there the dev extra counts too.
    """
    settings = ConfigParser(delimiters=['='], interpolation=None)
    settings.read(root / 'settings.ini', encoding='utf-8')

    def plain(name):
        return re.match(r'[\w.-]+', name)[0].lower().replace('_', '-')

    # MindSpeed has no package: README says how it is installed
    def asked(*keys):
        return {plain(r) for k in keys for r in settings['DEFAULT'].get(k, '').split()} | {
            'mmkit',
            'mindspeed',
        }

    owners = packages_distributions()
    library_asks = asked('requirements', 'toy_requirements', 'npu_requirements')
    for where, tree in trees(root):
        if where.startswith('tests/') or where == 'setup.py':
            continue
        for name in sorted(
            {n.split('.')[0] for n in imported(tree, absolute=True)} - sys.stdlib_module_names
        ):
            allowed = library_asks if where.startswith('mmkit/') else library_asks | asked('dev_requirements')
            if not {plain(owner) for owner in owners.get(name, [name])} & allowed:
                yield f'{where}: imports {name}, which settings.ini does not require'


def documented(root):
    "Every public function and class has a docstring, and every public function type hints."
    for name, text in modules(root):
        for n in public(ast.parse(text)):
            if not ast.get_docstring(n):
                yield f'mmkit.{name}: {n.name} has no docstring'
            if isinstance(n, ast.ClassDef):
                continue
            bare = [
                a.arg for a in [*n.args.posonlyargs, *n.args.args, *n.args.kwonlyargs] if a.annotation is None
            ]
            if bare or n.returns is None:
                yield f'mmkit.{name}: {n.name} has no type hint for {", ".join(bare) or "what it returns"}'


def titles(root):
    "The first cell is `# Title` and a line `> one sentence`."
    for p, cells in notebooks(root):
        first = source(cells[0]) if cells and cells[0]['cell_type'] == 'markdown' else ''
        if not re.match(r'# \S.*\n+> \S', first):
            yield f'{p.name}: the first cell is not `# Title` and `> sentence`'


def words(root):
    "Words that were replaced are gone: a reader finds what a paper, Megatron, torch or diffusers says."
    pages = [p for p in files(root) if p.suffix in ('.ipynb', '.md') or p.parts[-2:-1] == ('tests',)]
    for p in pages:
        if p.name == 'test_house.py' or p.suffix not in ('.ipynb', '.md', '.py'):
            continue
        if p.suffix == '.ipynb':
            cells = json.loads(p.read_text(encoding='utf-8'))['cells']
            text = '\n'.join(map(source, cells))
        else:
            text = p.read_text(encoding='utf-8')
        for banned, wanted in BANNED.items():
            if found := re.search(rf'(?i)\b{banned}\b', text):
                yield f'{p.name} says {found[0]!r}: say {wanted}'


def links(root):
    "A link in a notebook leads to a file that is there."
    for p, cells in notebooks(root):
        for c in cells:
            text = (
                re.sub(r'```.*?```|`[^`]*`', '', source(c), flags=re.S)
                if c['cell_type'] == 'markdown'
                else ''
            )
            for target in re.findall(r'\]\(([^)\s#]+)', text):
                if not re.match(r'\w+:', target) and not (p.parent / target).exists():
                    yield f'{place(p, c)}: a link to {target}, which is not there'


def looks(root):
    "A look shows a value or a figure; it is not a print (ranks can only print)."
    for p, cells in notebooks(root):
        for c in cells:
            if c['cell_type'] != 'code' or source(c).lstrip().startswith('%%'):
                continue
            for n in python(c).body:
                if (
                    isinstance(n, ast.Expr)
                    and isinstance(n.value, ast.Call)
                    and getattr(n.value.func, 'id', '') == 'print'
                ):
                    yield f'{place(p, c)}: a print'


def outputs(root):
    "Library notebooks are saved without outputs; a tutorial has a saved picture, no error and no widget."
    for p, cells in library(root):
        for c in cells:
            if c.get('outputs'):
                yield f'{place(p, c)}: a library notebook with a saved output'
    for p, cells in tutorials(root):
        saved = [o for c in cells for o in c.get('outputs', [])]
        if not any('image/png' in o.get('data', {}) for o in saved):
            yield f'{p.name}: a tutorial without a saved picture'
        for o in saved:
            if o['output_type'] == 'error':
                yield f'{p.name}: a saved output is an error: {o.get("ename")}'
            if 'application/vnd.jupyter.widget-view+json' in o.get('data', {}):
                yield (
                    f'{p.name}: a saved output is a widget, which is gone with its kernel; what stays is the'
                    ' text beside it'
                )
        if 'widgets' in json.loads(p.read_text(encoding='utf-8'))['metadata']:
            yield f'{p.name}: the state of widgets is saved'


def shown_configs(root):
    "A config in a saved output of a tutorial has exactly the settings that a Config has now."
    from mmkit.config import Config
    from mmkit.core.values import dumps, read

    def names(tree, above=''):
        return {above + name for name in tree} | {
            inner
            for name, part in tree.items()
            if isinstance(part, dict)
            for inner in names(part, f'{above}{name}.')
        }

    for p, cells in tutorials(root):
        for text in (
            ''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])
        ):
            found = re.fullmatch(r'```json\n(.*)\n```\s*', text, re.S)
            if not found or 'task' not in (tree := json.loads(found[1])):
                continue
            try:
                lacking = names(json.loads(dumps(read(Config, tree)))) - names(tree)
            except ValueError as error:
                yield f'{p.name} shows a config of another time: {error}'
            else:
                if lacking:
                    yield f'{p.name} shows a config without {", ".join(sorted(lacking))}: run it again'


def weights(root):
    "A picture is at most 100 kB, a notebook at most 500 kB."
    for p in files(root):
        if p.suffix in ('.png', '.jpg', '.jpeg', '.gif', '.svg') and p.stat().st_size > PICTURE_LIMIT:
            yield f'{p.name}: {p.stat().st_size // 1000} kB'
    for p, cells in notebooks(root):
        if p.stat().st_size > NOTEBOOK_LIMIT:
            yield f'{p.name}: {p.stat().st_size // 1000} kB saved'
        for data in [o.get('data', {}) for c in cells for o in c.get('outputs', [])] + [
            a for c in cells for a in c.get('attachments', {}).values()
        ]:
            for kind, body in data.items():
                size = (
                    len(''.join(body))
                    if kind.endswith('xml')
                    else len(base64.b64decode(''.join(body)))
                    if kind.startswith('image/')
                    else 0
                )
                if size > PICTURE_LIMIT:
                    yield f'{p.name}: a picture of {size // 1000} kB'


def machine_words(root):
    "No path of one machine and no package host in any text file."
    words = re.compile(
        r'(?<![\w.~}-])/(?:work|root|farm|opt)(?:/[\w.-]+)+|\bpypi\.org|pythonhosted\.org|download\.pytorch\.org|--(?:extra-)?index-url|registry\.npmjs|mirrors\.\w+\.\w+'
    )
    for p in files(root):
        try:
            text = p.read_text(encoding='utf-8')
        except UnicodeDecodeError:
            continue
        for word in sorted(set(words.findall(text))):
            yield f'{p.relative_to(root)}: {word}'


def top_level(root):
    "The top level holds what DESIGN names and nothing else."
    extra = {p.relative_to(root).parts[0] for p in files(root)} - TOP
    if extra:
        yield f'top level beyond the design: {sorted(extra)}'


@functools.lru_cache
def import_report(root):
    """What a new process, in which no accelerator is visible, sees when it imports mmkit and then every
    module of it.
    """
    code = """
import importlib, json, os, sys, threading
before = dict(os.environ); import mmkit; report = {'torch': 'torch' in sys.modules}; bad = report['bad'] = []
for name in json.loads(sys.argv[1]):
    try: importlib.import_module(name)
    except Exception as error: bad.append(f'{name} cannot be imported: {type(error).__name__}: {error}'); continue
    late = [m for m in json.loads(sys.argv[2]) if m in sys.modules]
    if late: bad.append(f'{name} imports {", ".join(late)} at import'); [sys.modules.pop(m) for m in late]
    torch = sys.modules.get('torch'); dist = getattr(torch, 'distributed', None)
    if dist and dist.is_available() and dist.is_initialized(): bad.append(f'{name} starts a process group'); dist.destroy_process_group()
    if torch and hasattr(torch, 'cuda') and torch.cuda.is_initialized(): bad.append(f'{name} starts an accelerator')
    if os.environ != before: bad.append(f'{name} changes the environment'); before = dict(os.environ)
    if threading.active_count() > 1: bad.append(f'{name} starts a thread'); break
json.dump(report, open(sys.argv[3], 'w'))
"""  # noqa: E501
    names = [f'mmkit.{name}' for name, _ in modules(root) if not name.endswith('__init__')]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'report.json'
        env = {
            **os.environ,
            'PYTHONPATH': str(root),
            'CUDA_VISIBLE_DEVICES': '',
            'ASCEND_RT_VISIBLE_DEVICES': '',
            'PYTHONDONTWRITEBYTECODE': '1',
        }
        ran = subprocess.run(
            [sys.executable, '-W', 'ignore', '-c', code, json.dumps(names), json.dumps(LATE), str(out)],
            cwd=folder,
            env=env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=120,
        )
        report = (
            json.loads(out.read_text())
            if out.exists()
            else {'torch': False, 'bad': [f'importing mmkit ended with {ran.returncode}']}
        )
    return report['torch'], tuple(report['bad']), (ran.stdout + ran.stderr).strip()


def light_import(root):
    "`import mmkit` imports no torch."
    if import_report(root)[0]:
        yield 'import mmkit imports torch'


def quiet_import(root):
    "Importing every module starts nothing, prints nothing, changes nothing and loads no heavy library early."
    _, bad, said = import_report(root)
    yield from bad
    if said:
        yield f'importing mmkit prints: {said[:300]}'


def export(root, folder):
    "What `nbdev_export` makes of the notebooks of `root`, into `folder`/mmkit."
    from nbdev.export import nb_export

    for p, _ in library(root):
        nb_export(str(p), lib_path=str(folder / 'mmkit'))


def fresh_export(root):
    "Every module is what its notebook exports, and every module has a notebook."

    def bare(text):
        return '\n'.join(line for line in text.split('\n') if not re.match(r'# (%%|AUTOGENERATED)', line))

    has = {name: text for name, text in modules(root) if not name.endswith('__init__')}
    with tempfile.TemporaryDirectory() as folder:
        export(root, Path(folder))
        made = dict(modules(Path(folder)))
    for name in sorted(made.keys() | has.keys()):
        if name not in made:
            yield f'mmkit.{name} comes from no notebook'
        elif bare(made[name]) != bare(has.get(name, '')):
            yield f'mmkit.{name} is stale: run nbdev_export'


def page(root):
    "README.md, its pictures and the map of the index are what tests/readme.py makes of the notebooks."
    try:
        yield from (
            f'{path.relative_to(root)} is stale: run python tests/readme.py' for path, _ in readme.stale(root)
        )
    except SystemExit as refusal:
        yield str(refusal)


def pictured(root):
    "README shows at least two pictures."
    n = len(
        re.findall(
            r'^!\[[^\]]+\]\(nbs/images/[\w-]+\.png\)', (root / 'README.md').read_text(encoding='utf-8'), re.M
        )
    )
    if n < 2 and any(tutorials(root)):
        yield f'README.md shows {n} pictures; name two saved ones of the tutorials (tests/readme.py says how)'


def identified(root):
    "Every cell has an id of its own (nbformat 4.5), or each export would give the modules new cell numbers."
    for p, cells in notebooks(root):
        ids = {c.get('id') for c in cells}
        if (
            None in ids
            or len(ids) < len(cells)
            or json.loads(p.read_text(encoding='utf-8'))['nbformat_minor'] < 5
        ):
            yield f'{p.name}: cells without an id of their own, or nbformat below 4.5'


# A small house that keeps every rule, and for every rule ways to break it


def cell(text, kind='code', **more):
    extra = {'execution_count': None, 'outputs': []} if kind == 'code' else {}
    return {'cell_type': kind, 'metadata': {}, 'source': text.splitlines(True), **extra, **more}


def notebook(*cells, title='# Title\n> One sentence.', minor=5):
    cells = [{'id': f'c{i}', **c} for i, c in enumerate([cell(title, 'markdown'), *cells])]
    return json.dumps({'cells': cells, 'metadata': {}, 'nbformat': 4, 'nbformat_minor': minor})


def room(name, *texts, **more):
    return notebook(cell(f'#| default_exp {name}'), *map(cell, texts), **more)


def showing(data, **more):
    return {'output_type': 'display_data', 'metadata': {}, 'data': data, **more}


def picture(size=100):
    return showing({'image/png': base64.b64encode(bytes(size)).decode()})


ONE = 'def one() -> int:\n    "Returns 1."\n    return 1\n'
SMALL = {
    'settings.ini': '[DEFAULT]\nlib_name = mmkit\nlib_path = mmkit\nnbs_path = nbs\n',
    'mmkit/__init__.py': '',
    'mmkit/core/__init__.py': '',
    'mmkit/models/__init__.py': '',
    'nbs/0_core/00_device.ipynb': room('core.device', '#| export\n' + ONE),
    'nbs/3_models/00_rope.ipynb': room('models.rope', '#| export\nfrom mmkit.core.device import one'),
    'nbs/index.ipynb': notebook(
        cell('<!-- map -->', 'markdown'), cell('![a](images/loss.png)\n![b](images/answer.png)', 'markdown')
    ),
    'nbs/tutorials/1_first.ipynb': notebook(
        cell('#| label: loss\none()', outputs=[picture()]),
        cell('#| label: answer\none()', outputs=[picture()]),
    ),
}


def long_function(lines):
    return 'def long() -> None:\n    "Does much."\n' + '    one()\n' * (lines - 2)


def rope(*texts, **more):
    return {'nbs/3_models/00_rope.ipynb': room('models.rope', *texts, **more)}


def device(text):
    return {'mmkit/core/device.py': text}


def rope_module(text):
    return {'mmkit/models/rope.py': text}


def tutorial(*cells, **more):
    return {'nbs/tutorials/1_first.ipynb': notebook(*cells, **more)}


FAKE_TORCH = {'torch.py': ''}
PLANTED = [
    (
        order,
        rope('#| export\nfrom mmkit.trainer.loop import fit')
        | {'nbs/6_trainer/08_loop.ipynb': room('trainer.loop')},
        'only lower numbers',
    ),
    (
        order,
        rope('def late():\n    from mmkit.trainer import loop')
        | {'nbs/6_trainer/08_loop.ipynb': room('trainer.loop')},
        'only lower numbers',
    ),
    (
        order,
        rope('%load_ext mmkit.launcher.run') | {'nbs/7_launcher/02_run.ipynb': room('launcher.run')},
        'only lower numbers',
    ),
    (
        order,
        {'nbs/4_converters/00_weights.ipynb': room('converters.weights', 'import mmkit.models.rope')},
        'folders 3, 4 and 5',
    ),
    (order, rope('from mmkit.core.devices import one'), 'no numbered notebook'),
    (order, {'nbs/3_models/00_shapes.ipynb': room('models.shapes')}, 'two notebooks of number 0'),
    (own_name, {'nbs/3_models/00_rope.ipynb': room('models.ropes')}, 'default_exp'),
    (own_name, rope('#| export\nimport json', '#| export\nimport re\nx = 1'), 'second exported import cell'),
    (undefined_names, rope_module('def f(): return [lost for _ in range(2)]'), 'uses lost'),
    (undefined_names, rope_module('class A:\n    here = 1\n    there = here + gone'), 'uses gone'),
    (undefined_names, rope_module('def f(x: Tensor): return x'), 'uses Tensor'),
    (sizes, rope_module(long_function(42)), 'long has 41 lines'),
    (sizes, rope_module('x = 1\n' * 401), '401 lines of code'),
    (sizes, tutorial(cell(long_function(10))), 'long has 9 lines'),
    (star_imports, rope('from mmkit.core.device import *'), 'import *'),
    (star_imports, rope_module('from ..core.device import *'), 'import *'),
    (bare_excepts, rope_module('try: x = 1\nexcept: pass'), 'bare except'),
    (bare_excepts, tutorial(cell('%time 1\ntry: x = 1\nexcept: pass')), 'bare except'),
    (class_names, rope_module('class MeshManager: pass'), 'MeshManager'),
    (class_names, {'mmkit/models/utils.py': ''}, 'no home'),
    (npu_words, rope_module('import torch_npu'), 'torch_npu'),
    (npu_words, rope_module('backend = "hccl"'), 'hccl'),
    (npu_words, rope_module('name = "HCCL_SOCKET_IFNAME"'), 'HCCL'),
    (one_path, rope_module('import os\nx = world_size'), 'says world_size'),
    (one_path, rope_module('def f(mesh): return mesh.layout.pp > 1'), 'compares'),
    (one_path, rope_module('def f(layout): return layout.vpp == 1'), 'compares'),
    (one_path, rope_module('def f(mesh): return 1 if mesh.tp.size != 1 else 2'), 'compares'),
    (environment, rope_module('import os\nx = os.environ["HOME"]'), 'environ'),
    (environment, rope_module('from os import getenv'), 'getenv'),
    (required, rope_module('import pytest'), 'imports pytest'),
    (required, rope('def f():\n    from no_such_package import x'), 'imports no_such_package'),
    (documented, rope_module('def f() -> int: return 1'), 'no docstring'),
    (documented, rope_module('class A: pass'), 'no docstring'),
    (documented, rope_module('def f(x) -> int:\n    "Returns x."\n    return x'), 'type hint for x'),
    (documented, rope_module('def f(x: int):\n    "Returns x."\n    return x'), 'what it returns'),
    (titles, rope(title='# Title'), 'first cell'),
    (titles, rope(title='## Title\n> One sentence.'), 'first cell'),
    (words, rope('model, a film'), 'say video'),
    (words, {'README.md': 'Films of hearts'}, 'say video'),
    (links, tutorial(cell('see [it](../gone.ipynb)', 'markdown')), 'gone.ipynb, which is not there'),
    (looks, rope('x = 1\nprint(x)'), 'a print'),
    (outputs, {'nbs/3_models/00_rope.ipynb': notebook(cell('1', outputs=[picture()]))}, 'saved output'),
    (outputs, tutorial(cell('1')), 'without a saved picture'),
    (
        outputs,
        tutorial(
            cell(
                '1',
                outputs=[
                    picture(),
                    {'output_type': 'error', 'ename': 'KeyError', 'evalue': '', 'traceback': []},
                ],
            )
        ),
        'KeyError',
    ),
    (
        outputs,
        tutorial(
            cell(
                '1',
                outputs=[
                    picture(),
                    showing({'application/vnd.jupyter.widget-view+json': {}, 'text/plain': ''}),
                ],
            )
        ),
        'a widget',
    ),
    (
        outputs,
        {
            'nbs/tutorials/1_first.ipynb': (
                notebook(cell('1', outputs=[picture()])).replace(
                    '"metadata": {}, "nbformat"', '"metadata": {"widgets": {}}, "nbformat"'
                )
            )
        },
        'state of widgets',
    ),
    (
        shown_configs,
        tutorial(
            cell(
                '1',
                outputs=[
                    showing(
                        {
                            'text/markdown': (
                                '```json\n{"task": "qwen2_5_vl", "weights": "here", "layout": {"tp": 2}}\n```'
                            )
                        }
                    )
                ],
            )
        ),
        'layout.sequence_parallel',
    ),
    (
        shown_configs,
        tutorial(
            cell(
                '1',
                outputs=[
                    showing(
                        {
                            'text/markdown': (
                                '```json\n{"task": "qwen2_5_vl", "weights": "here", "layout": {"tpp":'
                                ' 2}}\n```'
                            )
                        }
                    )
                ],
            )
        ),
        "no ['tpp']",
    ),
    (weights, tutorial(cell('1', outputs=[picture(100_001)])), 'a picture of 100 kB'),
    (
        weights,
        tutorial(cell('1', outputs=[showing({'image/svg+xml': 'x' * 100_001})])),
        'a picture of 100 kB',
    ),
    (weights, {'nbs/images/large.png': 'x' * 100_001}, 'large.png'),
    (weights, tutorial(cell('x' * 500_001)), 'saved'),
    (machine_words, {'README.md': 'see /' + 'work/shared/notes.md'}, 'README.md'),
    (machine_words, rope('x = "/' + 'root/data"'), 'rope.ipynb'),
    (machine_words, {'constraints.txt': '--' + 'index-url x'}, 'constraints.txt'),
    (top_level, {'tools/run.py': ''}, 'tools'),
    (light_import, {'mmkit/__init__.py': 'import torch'} | FAKE_TORCH, 'imports torch'),
    (quiet_import, device('print("hello")'), 'prints: hello'),
    (quiet_import, device('import warnings, sys; sys.stderr.write("careful")'), 'prints: careful'),
    (quiet_import, device('import os; os.environ["A_NEW_NAME"] = "1"'), 'changes the environment'),
    (
        quiet_import,
        device('import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()'),
        'starts a thread',
    ),
    (quiet_import, device('import PIL') | {'PIL/__init__.py': ''}, 'imports PIL'),
    (quiet_import, device('import no_such_package'), 'cannot be imported'),
    (
        quiet_import,
        device('import torch')
        | {
            'torch/__init__.py': 'from . import distributed',
            'torch/distributed.py': 'destroy_process_group = is_available = is_initialized = lambda: True',
        },
        'process group',
    ),
    (
        quiet_import,
        device('import torch')
        | {
            'torch/__init__.py': 'from . import cuda',
            'torch/cuda.py': 'is_initialized = lambda: True',
        },
        'starts an accelerator',
    ),
    (fresh_export, device(ONE.replace('1', '2')), 'stale'),
    (fresh_export, {'mmkit/models/alone.py': ''}, 'no notebook'),
    (page, {'README.md': 'old'}, 'stale'),
    (page, {'nbs/1_toy/00_qwen.ipynb': room('toy.qwen', title='# Toy\n> New.')}, 'index.ipynb is stale'),
    (page, {'nbs/tutorials/1_first.ipynb': notebook(cell('one()', outputs=[picture()]))}, 'label: loss'),
    (page, {'nbs/images/loss.png': 'old'}, 'loss.png is stale'),
    (
        page,
        {'nbs/index.ipynb': notebook(cell('[away](gone.ipynb)', 'markdown'))},
        'gone.ipynb, which does not exist',
    ),
    (
        page,
        {
            'nbs/index.ipynb': notebook(
                cell('Do\n```sh\nthis\n```', 'markdown'), cell('<!-- zh -->\n```sh\nthat\n```', 'markdown')
            )
        },
        'other commands',
    ),
    (pictured, {'README.md': '![one](nbs/images/loss.png)'}, 'shows 1 pictures'),
    (identified, rope(minor=4), 'without an id'),
    (identified, tutorial(cell('1', id='c0')), 'without an id'),
]
RULES = list(dict.fromkeys(rule for rule, _, _ in PLANTED))


def write(folder, parts):
    for name, text in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding='utf-8')


@pytest.fixture
def small(tmp_path, monkeypatch):
    "The small house: notebooks, their modules and README."
    write(tmp_path, SMALL)
    monkeypatch.chdir(tmp_path)
    export(tmp_path, tmp_path)
    for path, body in readme.stale(tmp_path):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)
    return tmp_path


@pytest.mark.parametrize('rule', RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps(rule, monkeypatch):
    monkeypatch.chdir(ROOT)
    broken = list(rule(ROOT))
    assert not broken, '\n'.join([rule.__doc__, *broken])


@pytest.mark.parametrize(
    'rule, planted, words', PLANTED, ids=[f'{rule.__name__}-{i}' for i, (rule, _, _) in enumerate(PLANTED)]
)
def test_the_rule_catches(rule, planted, words, small):
    write(small, planted)
    broken = list(rule(small))
    assert any(words in line for line in broken), f'{rule.__name__} says {broken}'


def test_a_small_house_keeps_every_rule(small):
    assert {rule.__name__: broken for rule in RULES if (broken := list(rule(small)))} == {}


def test_every_rule_of_the_page_is_used():
    names = {
        name
        for name, f in globals().items()
        if isinstance(f, types.FunctionType) and f.__code__.co_varnames[:1] == ('root',)
    } - {'files', 'notebooks', 'library', 'tutorials', 'modules', 'trees', 'export'}
    assert names == {rule.__name__ for rule in RULES}
