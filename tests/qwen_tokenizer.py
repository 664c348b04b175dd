"""The exact Qwen2.5 tokenizer, for tests, from the rank file inside the dashscope wheel (Apache-2.0).

The dev extra brings the wheel for this file alone; the package itself is never imported. A rank file lists
tokens by rank. Splitting token r by byte pairs of lower rank leaves exactly two parts: the r-th merge.
"""

import base64
import hashlib
import itertools
from pathlib import Path

from mmkit.toy.qwen import package_folder, qwen2_bpe, save_tokenizer

SHA256 = {
    'vocab.json': 'ca10d7e9fb3ed18575dd1e277a2579c16d108e32f27439684afa0e10b1440910',
    'merges.txt': '8831e4f1a044471340f7c0a83d7bd71306a5b867e95fd870f74d0c5308a904d5',
}


def read_ranks() -> dict[bytes, int]:
    "Rank of every token of the wheel's qwen.tiktoken."
    file = package_folder('dashscope', "'mmkit[dev]'") / 'resources' / 'qwen.tiktoken'
    return {
        base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())
    }


def two_parts(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    "The token cut by the merges of lower rank than its own; two parts, or the rank file is not a BPE."
    parts, own = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        joined = [(ranks.get(a + b, own), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        best, i = min(joined)
        if best >= own:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    if len(parts) != 2:
        raise ValueError(f'token {token!r} of rank {own} falls into {len(parts)} parts instead of 2')
    return parts


def byte_letters() -> dict[int, str]:
    "The printable letter that stands for each byte in GPT-2's byte-level BPE files."
    plain = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), ord('ÿ') + 1)]
    hidden = [byte for byte in range(256) if byte not in plain]
    return {**{byte: chr(byte) for byte in plain}, **{byte: chr(256 + i) for i, byte in enumerate(hidden)}}


def wrong_files(folder: Path) -> list[str]:
    "Files that are missing or differ from the published ones."
    return [
        name
        for name, sha in SHA256.items()
        if not (folder / name).exists() or hashlib.sha256((folder / name).read_bytes()).hexdigest() != sha
    ]


def real_qwen_tokenizer(folder: str | Path) -> Path:
    """Writes Qwen2.5's tokenizer as a Hugging Face folder (about 6 s.

    At once when it is there already); returns the folder.
    """
    from tokenizers import models

    folder = Path(folder)
    if (folder / 'tokenizer_config.json').exists() and not wrong_files(folder):
        return folder
    ranks, letters = read_ranks(), byte_letters()
    spelled = {token: ''.join(letters[byte] for byte in token) for token in sorted(ranks, key=ranks.get)}
    merges = [tuple(spelled[part] for part in two_parts(token, ranks)) for token in spelled if len(token) > 1]
    vocabulary = {word: ranks[token] for token, word in spelled.items()}
    save_tokenizer(qwen2_bpe(models.BPE(vocab=vocabulary, merges=merges)), folder)
    if wrong := wrong_files(folder):
        raise ValueError(f'{folder}: {wrong} differ from the published Qwen2.5 files')
    return folder
