"""README.md and README_zh.md, in Chinese, from nbs/index.ipynb, without Quarto.

    python tests/readme.py            write both pages, their pictures, and the map in the index python
tests/readme.py --check    exit 1 if one of them is stale

A text of the index that begins with `<!-- zh -->` stands in the Chinese page, below the English one that it
translates; commands and pictures are the same in both, or it is an error. Code and the map stand in both
pages. The cell of the index that begins with `<!-- map -->` is a table of all notebooks, each with the
sentence under its own title. A picture is named once in a tutorial, by a first line `#| label: NAME` in the
cell whose saved output it is, and shown in the index as `![what it shows](images/NAME.png)`.
"""

import argparse
import base64
import json
import posixpath
import re
import sys
from pathlib import Path

LIMIT, MAP, CHINESE = 100_000, '<!-- map -->', '<!-- zh -->'
NOTE = '<!-- Made from nbs/index.ipynb by tests/readme.py: edit the notebook. -->\n\n'
DIRECTIVE, LINK, SHARED = (
    re.compile(r'#\s*\|\s*(.*)'),
    re.compile(r'(!?\[[^\]]*\]\()([^)\s#]+)'),
    re.compile(r'```.*?```|!\[[^\]]*\]\(([^)]*)\)', re.S),
)


def read(path):
    return json.loads(path.read_text(encoding='utf-8'))


def text_of(cell):
    return ''.join(cell['source'])


def house_map(root):
    "The table of all notebooks, folder by folder."
    rows = [MAP, '| notebook | what it is |', '|---|---|']
    folders = [*sorted((root / 'nbs').glob('[0-9]_*')), root / 'nbs/tutorials']
    for path in (path for folder in folders for path in sorted(folder.glob('*.ipynb'))):
        title = f'| **{re.sub(r"^[0-9]_", "", path.parent.name)}** | |'
        if title not in rows:
            rows.append(title)
        sentence = re.search(r'^> *(.*)', text_of(read(path)['cells'][0]), re.M)
        rows.append(
            f'| [{path.stem}]({path.relative_to(root / "nbs").as_posix()}) |'
            f' {sentence[1].replace("|", chr(92) + "|") if sentence else ""} |'
        )
    return '\n'.join(rows)


def index(root):
    "The index, with the map as it has to be."
    notebook = read(root / 'nbs/index.ipynb')
    for cell in notebook['cells']:
        if text_of(cell).startswith(MAP):
            cell['source'] = house_map(root).splitlines(True)
    return notebook


def labelled(root):
    "name -> the last picture saved under the cell that bears the label, over all tutorials."
    found = {}
    for path in sorted((root / 'nbs/tutorials').glob('*.ipynb')):
        for cell in read(path)['cells']:
            name = re.search(r'^#\s*\|\s*label:\s*(\S+)', text_of(cell), re.M)
            saved = [
                ''.join(o['data']['image/png'])
                for o in cell.get('outputs', [])
                if 'image/png' in o.get('data', {})
            ]
            if name and saved:
                found[name[1]] = base64.b64decode(saved[-1])
    return found


def shown(output):
    "One saved output as Markdown."
    data = {kind: ''.join(body) for kind, body in output.get('data', {}).items()}
    if 'text/markdown' in data:
        return data['text/markdown'].strip()
    text = (data.get('text/plain') or ''.join(output.get('text', ''))).rstrip()
    return '\n'.join('    ' + line for line in text.split('\n')) if text else ''


def blocks(cell):
    "The Markdown blocks of one cell; `hide` leaves it out, `hide_input` shows its outputs only."
    text = text_of(cell)
    if cell['cell_type'] == 'markdown':
        return [text.strip()]
    marks = {m[1].split(':')[0].strip() for m in map(DIRECTIVE.match, text.split('\n')) if m}
    if 'hide' in marks or cell['cell_type'] != 'code':
        return []
    code = '\n'.join(line for line in text.split('\n') if not DIRECTIVE.match(line)).strip()
    return ([f'```python\n{code}\n```'] if code and 'hide_input' not in marks else []) + [
        s for o in cell['outputs'] if (s := shown(o))
    ]


def linked(text, root, made):
    "The text with links as seen from the top of the project; a link that leads nowhere is an error."

    def move(found):
        if re.match(r'\w+:', found[2]):
            return found[0]
        target = posixpath.normpath(posixpath.join('nbs', found[2]))
        if target not in made and not (root / target).exists():
            sys.exit(f'nbs/index.ipynb links to {found[2]}, which does not exist')
        return found[1] + target

    return ''.join(
        part if part.startswith('```') else LINK.sub(move, part)
        for part in re.split(r'(```.*?```)', text, flags=re.S)
    )


def pages(notebook):
    "The text of README.md and, where the index has Chinese texts, of README_zh.md."
    cells = notebook['cells']
    chinese = [n for n, cell in enumerate(cells) if text_of(cell).startswith(CHINESE)]

    def shared(n):
        return [found[1] or found[0] for found in SHARED.finditer(text_of(cells[n]))]

    for n in chinese:
        if shared(n - 1) != shared(n):
            sys.exit(
                'nbs/index.ipynb: a Chinese text has other commands or pictures than the English one above'
                f' it: {(set(shared(n - 1)) ^ set(shared(n))) or "another order"}'
            )

    def page(others):
        return (
            '\n\n'.join(
                b.removeprefix(CHINESE).strip()
                for n, cell in enumerate(cells)
                if n not in others
                for b in blocks(cell)
            )
            + '\n'
        )

    return {'README.md': page(chinese)} | (
        {'README_zh.md': page([n - 1 for n in chinese])} if chinese else {}
    )


def build(root):
    "path -> bytes of the index, of every picture README shows, and of the pages."
    notebook, tutorials, made = index(root), labelled(root), {}
    if notebook != read(root / 'nbs/index.ipynb'):
        made['nbs/index.ipynb'] = (
            json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + '\n'
        ).encode()
    texts = pages(notebook)
    for name in re.findall(r'\]\(images/([\w-]+)\.png', texts['README.md']):
        if name not in tutorials:
            sys.exit(
                f'nbs/index.ipynb shows images/{name}.png, but no tutorial cell with a saved picture has the'
                f' line `#| label: {name}`'
            )
        if len(tutorials[name]) > LIMIT:
            sys.exit(
                f'the picture {name} has {len(tutorials[name]) // 1000} kB; README shows pictures of at most'
                f' {LIMIT // 1000} kB'
            )
        made[f'nbs/images/{name}.png'] = tutorials[name]
    return made | {page: (NOTE + linked(text, root, made | texts)).encode() for page, text in texts.items()}


def stale(root):
    "(path, bytes it should hold) of every file that is not what it should be."
    return [
        (root / name, body)
        for name, body in build(root).items()
        if not (root / name).exists() or (root / name).read_bytes() != body
    ]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--check', action='store_true')
    parser.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent)
    given = parser.parse_args()
    for path, body in stale(given.root):
        if given.check:
            sys.exit(f'{path.relative_to(given.root)} is stale: run python tests/readme.py')
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(body)


if __name__ == '__main__':
    main()
