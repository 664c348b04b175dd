"""The measures of the source as a table: `python tests/tools/house.py`.

Lines of code are counted as tests/test_house.py counts them, after nbdev_export."""

import ast
import importlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
TERMS = (
    'inference|hidden states|replica|broadcast|EMA|recomputation|packed sequence|node|metrics'
    '|KV cache|all-reduce|all-gather|shard|classifier-free guidance'
).split('|')


def prose(root: Path) -> str:
    "The text of all markdown cells."
    found = []
    for path in sorted((root / 'nbs').rglob('*.ipynb')):
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        found += [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    return '\n'.join(found)


def main() -> None:
    "Prints the table."
    house = importlib.import_module('test_house')
    texts = {name: text for name, text in house.modules(ROOT) if not name.endswith('__init__')}
    trees = {name: ast.parse(text) for name, text in texts.items()}
    functions = [
        (house.code_lines(f, texts[name]), f'{name}.{f.name}')
        for name, tree in trees.items()
        for f in house.definitions(tree)
    ]
    modules = [(house.code_lines(tree, texts[name]), name) for name, tree in trees.items()]
    # __all__ and the first line are nbdev's
    lines = [line for text in texts.values() for line in text.split('\n# %% ', 2)[-1].split('\n')]
    public = sum(1 for tree in trees.values() for _ in house.public(tree))
    words = prose(ROOT)
    rows = [
        ('modules, lines', f'{len(texts)}, {len(lines)}'),
        ('lines above 110 columns', sum(len(line) > 110 for line in lines if not line.startswith('../'))),
        ('longest function', '{} lines, {}'.format(*max(functions))),
        ('functions above 40 lines', sum(size > 40 for size, _ in functions)),
        (
            'modules above 400 lines',
            ', '.join(f'{name} {size}' for size, name in sorted(modules) if size > 400),
        ),
        ('public functions and classes', public),
        ('words that are banned', len(list(house.words(ROOT)))),
        *((f'prose: {term}', len(re.findall(rf'(?i)\b{term}s?\b', words))) for term in TERMS),
    ]
    print('\n'.join(['| measure | found |', '|---|---|', *(f'| {name} | {value} |' for name, value in rows)]))


if __name__ == '__main__':
    main()
