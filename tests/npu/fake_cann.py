"""Builds the libraries that torch_npu's wheel wants from CANN, from the wheel's own list of symbols.

Nothing of CANN is needed or copied.
"""

import re
import subprocess
from pathlib import Path

HERE = Path(__file__).resolve().parent
SYSTEM = re.compile(r'(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+|ld-linux.*)\.so')
RUNTIME = re.compile(
    r'(acl(rt|mdl|op|prof|sys)?[A-Z]\w+|acltdt\w+|Hccl[A-Z]\w+|Msprof\w+|rt(Dev|Function|Get|Kernel)\w+|_ZNK?2ge\w+|(v?snprintf|strcpy)_s)'
)
# nothing may be sent unseen
TRAFFIC = re.compile(r'Hccl(All|Reduce|Broadcast|Scatter|Send|Recv|Batch|Barrier)\w*')
OPERATOR = re.compile(r'aclnn[A-Z]\w+')
# absent, the wheel does without
OPTIONAL = re.compile(r'acl(Create|Destroy)(Tensor|Scalar|IntArray|BoolArray|TensorList|ScalarList)')
DEFINED = re.compile(r'^(?:int|void|size_t|const char \*)\s*(\w+)\(', re.M)


def output_of(*command):
    "What a command of binutils prints, as lines."
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def symbols(library, kind):
    "The names that a library defines or leaves undefined, without versions."
    return {
        line.split()[-1].split('@')[0]
        for line in output_of('nm', '-D', f'--{kind}-only', library)
        if line.strip()
    }


def needed(library):
    "The libraries that a library names as needed."
    return re.findall(r'\(NEEDED\).*\[(.+?)\]', '\n'.join(output_of('readelf', '-d', library)))


def link(out, source, *options):
    "One shared library of one source; it finds its neighbours in its own folder."
    subprocess.run(
        [
            'gcc',
            '-shared',
            '-fPIC',
            '-w',
            '-O1',
            '-o',
            out,
            f'-Wl,-soname,{out.name}',
            '-Wl,-rpath,$ORIGIN',
            source,
            *options,
        ],
        check=True,
    )


def wanted(torch_npu, torch):
    """(names of libraries, names of runtime functions, names of operators) that the wheel asks of CANN: by
    link, or by dlsym at run time.
    """
    own = [
        *torch_npu.glob('lib/*.so'),
        *torch_npu.glob('_C*.so'),
        *torch_npu.glob('dynamo/torchair/core/*.so'),
    ]
    theirs = [*torch.glob('lib/*.so*')]
    libraries = {name for library in own for name in needed(library) if not SYSTEM.match(name)} - {
        path.name for path in own + theirs
    }
    defined = set().union(*(symbols(library, 'defined') for library in own + theirs))
    linked = set().union(*(symbols(library, 'undefined') for library in own)) - defined
    looked_up = {
        word
        for line in output_of('strings', '-n', '5', torch_npu / 'lib/libtorch_npu.so')
        for word in line.split()
    }
    runtime = {
        name
        for name in linked | looked_up
        if RUNTIME.fullmatch(name) and not OPERATOR.fullmatch(name) and not OPTIONAL.fullmatch(name)
    }
    operators = {name.removesuffix('GetWorkspaceSize') for name in looked_up if OPERATOR.fullmatch(name)}
    return sorted(libraries), sorted(runtime), sorted(operators)


def build(folder, torch_npu, torch):
    """The libraries, in `folder`: libascendcl.so has every runtime function, libopapi.so every operator, the
    others are doors to the first.
    """
    # the wheel asks whether they are there, no more
    for part in ('runtime', 'compiler', 'opp'):
        (folder / part).mkdir(parents=True)
    libraries, runtime, operators = wanted(torch_npu, torch)
    text = (HERE / 'fake_cann.c').read_text(encoding='utf-8')

    def answer(name):
        return f'run_operator("{name}")' if TRAFFIC.fullmatch(name) else '0'

    answers = ''.join(
        f'int {name}(void) {{ return {answer(name)}; }}\n'
        for name in runtime
        if name not in set(DEFINED.findall(text))
    )
    door = 'static int door;\n'
    calls = 'int run_operator(const char *);\n' + ''.join(
        f'int {name}GetWorkspaceSize(void) {{ return 0; }}\nint {name}(void) {{ return'
        f' run_operator("{name}"); }}\n'
        for name in operators
    )
    for name, body in {'runtime.c': text + answers, 'door.c': door, 'operators.c': calls}.items():
        (folder / name).write_text(body, encoding='utf-8')
    runtime_library = folder / 'libascendcl.so'
    link(runtime_library, folder / 'runtime.c')
    link(folder / 'libopapi.so', folder / 'operators.c', runtime_library)
    for name in libraries:
        if name != runtime_library.name:
            link(folder / name, folder / 'door.c', '-Wl,--no-as-needed', runtime_library)
    return len(libraries), len(runtime), len(operators)
