"The real Qwen2.5 tokenizer is rebuilt exactly, and the toy's tokenizer behaves like it."

import unicodedata

import pytest
from qwen_tokenizer import real_qwen_tokenizer, two_parts

from mmkit.toy.qwen import PLAIN, SPECIAL, WORDS, special_ids, tiny_tokenizer

TEXTS = (
    'What is this?',
    'This is a test 😊\nI was born in 92000, and this is falsé.\n生活的真谛是',
    ' a  b\r\n\r\n12 x\u0301 你好！👩‍🚀',
    "we're <|im_end|> done",
)
PUBLISHED = (
    '🤗 Transformers 提供了可以轻松地下载并且训练先进的预训练模型的 API 和工具。',
    [
        144834,
        80532,
        93685,
        83744,
        34187,
        73670,
        104261,
        29490,
        62189,
        103937,
        104034,
        102830,
        98841,
        104034,
        104949,
        9370,
        5333,
        58143,
        102011,
        1773,
    ],
)


@pytest.fixture(scope='session')
def real(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(real_qwen_tokenizer(tmp_path_factory.mktemp('qwen')))


def test_published_numbers(real):
    assert type(real).__name__.startswith('Qwen2Tokenizer') and (len(real), real.vocab_size) == (
        151665,
        151643,
    )
    chat = real.apply_chat_template(
        [dict(role='user', content=[dict(type='image'), dict(type='text', text='Hi')])], tokenize=False
    )
    ids = real(chat)['input_ids']
    assert ids[:11] == [151644, 8948, 198, 2610, 525, 264, 10950, 17847, 13, 151645, 198]
    assert ids[11:17] == [151644, 872, 198, 151652, 151655, 151653]
    assert real.convert_tokens_to_ids(list(SPECIAL + PLAIN)) == list(range(151643, 151665))
    assert real(PUBLISHED[0])['input_ids'] == PUBLISHED[1]


def test_built_once(real):
    folder = real_qwen_tokenizer(real.name_or_path)
    stamp = (folder / 'vocab.json').stat().st_mtime_ns
    assert (real_qwen_tokenizer(folder) / 'vocab.json').stat().st_mtime_ns == stamp
    assert list(special_ids(folder)) == list(SPECIAL + PLAIN)


def test_files_alone_give_the_published_numbers(real):
    from tokenizers import Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    # transformers 5 builds its own pre-tokenizer, so look at ours without it
    alone = Tokenizer.from_file(f'{real.name_or_path}/tokenizer.json')
    assert WORDS == PRETOKENIZE_REGEX and alone.encode(PUBLISHED[0]).ids == PUBLISHED[1]
    for text in TEXTS:
        ids = real(text)['input_ids']
        assert alone.encode(text).ids == ids and real.decode(ids) == unicodedata.normalize('NFC', text)


def test_tiny_tokenizer_keeps_every_text(tmp_path):
    from transformers import AutoTokenizer

    tiny = AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path, TEXTS))
    for text in TEXTS:
        assert tiny.decode(tiny(text)['input_ids']) == unicodedata.normalize('NFC', text)
    assert [tiny(token)['input_ids'] for token in SPECIAL + PLAIN] == [
        [special_ids(tmp_path)[token]] for token in SPECIAL + PLAIN
    ]


def test_a_token_without_a_merge_is_refused():
    with pytest.raises(ValueError, match='falls into 3 parts'):
        two_parts(b'abc', {b'a': 0, b'b': 1, b'c': 2, b'abc': 3})
