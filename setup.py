"Install mmkit from settings.ini, the one place where names, versions and requirements stand."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=['='], interpolation=None)
settings.read(here / 'settings.ini', encoding='utf-8')
cfg = settings['DEFAULT']

setup(
    name=cfg['lib_name'],
    version=cfg['version'],
    description=cfg['description'],
    author=cfg['author'],
    author_email=cfg['author_email'],
    license='Apache-2.0',
    url=cfg['git_url'],
    keywords=cfg['keywords'].split(),
    long_description=(here / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    packages=find_packages(include=['mmkit', 'mmkit.*']),
    package_data={'mmkit': ['py.typed']},
    python_requires=f'>={cfg["min_python"]},<{cfg["max_python"]}',
    install_requires=cfg['requirements'].split(),
    extras_require={name: cfg[f'{name}_requirements'].split() for name in ('toy', 'npu', 'dev')},
    entry_points={'console_scripts': cfg['console_scripts'].split(), 'nbdev': ['mmkit=mmkit._modidx:d']},
    zip_safe=False,
)
