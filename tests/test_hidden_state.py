"""Hidden seeds, draws, clocks, devices and changed variables are found, by whatever name; honest code passes."""

import ast

import pytest

from tests.hidden_state import Names, findings, streams

FOUND = [
    # seeds and states
    ("torch.manual_seed(0)", "uses torch.manual_seed"),
    ("torch.random.manual_seed(0)", "uses torch.random.manual_seed"),
    ("from torch import manual_seed as ms\nms(0)", "imports torch.manual_seed"),
    ("start = torch.manual_seed\nstart(3)", "uses torch.manual_seed"),
    ("getattr(torch, 'manual_seed')(0)", "uses torch.manual_seed"),
    ("import torch as t\nt.seed()", "uses torch.seed"),
    ("source.seed()", "uses source.seed"),
    ("generator('a').manual_seed(3)", "uses ?.manual_seed"),
    ("torch.set_rng_state(state)", "uses torch.set_rng_state"),
    ("source.set_state(torch.default_generator.get_state())", "uses torch.default_generator"),
    ("torch.randn(3, generator=torch.default_generator)", "uses torch.default_generator"),
    ("torch.cuda.manual_seed_all(0)", "uses torch.cuda.manual_seed_all"),
    ("torch.cuda.set_rng_state_all(states)", "uses torch.cuda.set_rng_state_all"),
    ("torch.cuda.default_generators[0]", "uses torch.cuda.default_generators"),
    ("torch.Generator()", "calls torch.Generator"),
    ("from torch import Generator as G\nG()", "calls torch.Generator"),
    ("import numpy as np\nnp.random.default_rng(3)", "uses numpy.random.default_rng"),
    ("split(x, random_state=0)", "passes random_state="),
    ("split(x, random_state=seeds[0])", "passes random_state="),
    ("generate(seed=3)", "passes seed="),
    # draws that nobody named
    ("import numpy\nnumpy.random.seed(1)", "uses numpy.random.seed"),
    ("import numpy as np\nnp.random.normal(size=3)", "uses numpy.random.normal"),
    ("import numpy as np\nr = np.random\nr.normal(size=3)", "uses numpy.random"),
    ("from numpy import random", "imports numpy.random"),
    ("from numpy import random as r\nr.normal()", "imports numpy.random"),
    ("import numpy.random as r", "imports numpy.random"),
    ("from numpy.random import normal", "imports numpy.random"),
    ("from scipy import stats\nstats.norm(0, 1).rvs(3)", "draws by stats.norm(0, 1).rvs without rng"),
    ("from scipy.stats import norm\nnorm.rvs(size=3)", "draws by norm.rvs without rng"),
    ("torch.randn(3)", "draws by torch.randn without a generator"),
    ("from torch import rand\nrand(3)", "draws by rand without a generator"),
    ("import torch as t\nt.randperm(3)", "draws by t.randperm without a generator"),
    ("torch.rand_like(x)", "draws by torch.rand_like without a generator"),
    ("torch.randn(3, **double)", "draws by torch.randn without a generator"),
    ("double = {'dtype': d}\ntorch.randn(3, **double)", "draws by torch.randn without a generator"),
    ("torch.zeros(3).normal_()", "draws by torch.zeros(3).normal_ without a generator"),
    ("p.multinomial(3)", "draws by p.multinomial without a generator"),
    ("torch.distributions.Normal(0, 1).sample((3,))", "draws by torch.distributions.Normal(0, 1).sample"),
    ("nn.init.normal_(w)", "draws by nn.init.normal_"),
    ("from torch import nn\nnn.init.kaiming_normal_(w)", "draws by nn.init.kaiming_normal_ outside of seeded(…)"),
    ("import os\nos.urandom(8)", "uses os.urandom"),
    ("from os import urandom", "imports os.urandom"),
    # clocks, and modules by other ways
    ("import time", "imports time"),
    ("from datetime import datetime", "imports datetime"),
    ("import random", "imports random"),
    ("import secrets as s", "imports secrets"),
    ("import uuid", "imports uuid"),
    ("importlib.import_module('random')", "imports by import_module"),
    ("__import__('random')", "imports by __import__"),
    # devices and settings
    ("x.to('cuda:1')", "names the device 'cuda:1'"),
    ("torch.zeros(2, device='cpu')", "names the device 'cpu'"),
    ("x.cuda()", "uses x.cuda"),
    ("torch.cuda.set_device(1)", "uses torch.cuda.set_device"),
    ("torch.set_default_device(d)", "uses torch.set_default_device"),
    ("torch.set_num_threads(2)", "uses torch.set_num_threads"),
    # the environment
    ("import os\nos.environ['BOOK_SEED'] = '1'", "changes os.environ"),
    ("from os import environ as e\ne['BOOK_SEED'] = '1'", "changes os.environ"),
    ("import os\nsettings = os.environ\nsettings.update(A='1')", "changes os.environ"),
    ("import os\ndel os.environ['A']", "changes os.environ"),
    ("import os\nos.environ |= {}", "changes os.environ"),
    ("import os\nos.putenv('A', '1')", "uses os.putenv"),
    ("%env BOOK_SEED=1", "is no Python in its line 1"),
    ("x = 1\n!export A=1", "is no Python in its line 2"),
]


@pytest.mark.parametrize(("code", "found"), FOUND)
def test_hidden_state_is_found(code, found):
    assert any(finding.startswith(found) for finding in findings(code)), list(findings(code))


HONEST = [
    "x.cpu()",
    "run.seed_of",
    "generator('a')",
    "torch.rand(3, generator=g)",
    "'a cpu'",
    "x.device.type == 'cuda'",
    "torch.backends.cuda.matmul.allow_tf32",
    "place = {'generator': generator('a'), 'device': device()}\ntorch.rand(3, **place)",
    "options = double | {'generator': source}\ntorch.randn(3, **options)",
    "options = dict(double, generator=source)\ntorch.randn(3, **options)",
    "options = {}\noptions['generator'] = source\ntorch.randn(3, **options)",
    "def draw(n, **options):\n    return torch.randn(n, **options)",
    "with seeded('a'):\n    x = torch.randn(3)\n    y = law.sample()\n    nn.init.normal_(w)",
    "from helpers.lab import runtime\nwith runtime.seeded('a'):\n    torch.randn(3)",
    "from torch import nn\ndef start(w):\n    nn.init.normal_(w)",
    "from torch import nn\nnn.init.zeros_(w)",
    "norm.rvs(3, random_state=rng('a'))",
    "rng('a').normal(size=3)",
    "def f(generator: torch.Generator, rng: np.random.Generator): ...",
    "torch.cuda.is_available()",
    "import os\nos.environ.get('BOOK_SEED'), os.environ['HOME']",
    "counts.update(a)",
    "x.uniform_(0, 1, generator=g)",
    "normal.log_prob(x)",
]


@pytest.mark.parametrize("code", HONEST)
def test_what_only_looks_like_hidden_state_passes(code):
    assert list(findings("import numpy as np\nimport torch\n" + code)) == []


def test_a_block_behind_seeded_is_no_longer_seeded():
    code = "with seeded('a'):\n    x = torch.randn(3)\ny = torch.randn(3)"
    assert list(findings(code)) == ["draws by torch.randn without a generator"]


def test_names_of_one_piece_hold_in_the_next():
    names = Names()
    assert list(findings("from torch import randn as draw", names)) == []
    assert list(findings("draw(3)", names)) == ["draws by draw without a generator"]
    assert list(findings("draw(3)")) == []  # alone, it might be anything


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("seeded('a'), rng('b'), lab.generator('c')", ["a", "b", "c"]),
        ("generator(stream='a')", ["a"]),
        ("[generator(f'digits {size}') for size in sizes]", ["digits …"]),
        ("generator(name), generator(f'{a} {b}')", []),
        ("def draw(n, stream):\n    return generator(stream)\ndraw(3, 'a')\ndraw(4, stream='b')", ["a", "b"]),
        ("def draw(n, stream):\n    return generator(f'{stream} {n}')\ndraw(3, 'a')\ndraw(4, 'a')", []),
        ("other('a')", []),
    ],
)
def test_names_of_streams_are_read(code, names):
    assert sorted(streams([ast.parse(code)])) == names
