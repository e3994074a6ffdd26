"""With tests/no_network on PYTHONPATH, Python and its notebook kernels reach this machine and nothing else.

Every script carries a guard that stops at the system's door whatever the hook lets through. So no test here sends a
packet to another machine, not even one that fails.
"""

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tests" / "no_network"
# 192.0.2.0/24 and 2001:db8::/32 are reserved for documentation: nothing answers there.
GUARD = """
import sys

def guard(event, arguments):
    outside = ("192.0.2.1", "2001:db8::1", "example")
    if event.startswith("socket.") and any(host in repr(arguments) for host in outside):
        raise ConnectionAbortedError(f"the guard stopped {event}")

sys.addaudithook(guard)
"""
REPORT = """
try:
    {statement}
except OSError as error:
    print(f"{{type(error).__name__}}: {{error}}")
else:
    print("went through")
"""
UDP = "socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
TCP6 = "socket.socket(socket.AF_INET6)"
REFUSED = [
    ("socket.create_connection(('192.0.2.1', 80), timeout=5)", "192.0.2.1"),
    ("socket.create_connection(('example.org', 80), timeout=5)", "example.org"),
    ("socket.socket().connect(('192.0.2.1', 80))", "192.0.2.1"),
    ("socket.socket().connect_ex(('192.0.2.1', 80))", "192.0.2.1"),
    (f"{UDP}.connect(('192.0.2.1', 53))", "192.0.2.1"),
    (f"{UDP}.sendto(b'x', ('192.0.2.1', 53))", "192.0.2.1"),
    (f"{UDP}.sendto(b'x', 0, ('192.0.2.1', 53))", "192.0.2.1"),
    (f"{UDP}.sendmsg([b'x'], [], 0, ('192.0.2.1', 53))", "192.0.2.1"),
    ("socket.getaddrinfo('example.org', 80)", "example.org"),
    ("socket.getaddrinfo(b'example.org', 80)", "example.org"),
    ("socket.gethostbyname('example.org')", "example.org"),
    ("socket.gethostbyname_ex('example.org')", "example.org"),
    ("socket.gethostbyaddr('192.0.2.1')", "192.0.2.1"),
    ("socket.getnameinfo(('192.0.2.1', 80), 0)", "192.0.2.1"),
    ("asyncio.run(asyncio.open_connection('192.0.2.1', 80))", "192.0.2.1"),
    ("asyncio.run(asyncio.open_connection('example.org', 80))", "example.org"),
    ("urllib.request.urlopen('http://192.0.2.1/', timeout=5)", "192.0.2.1"),
    ("urllib.request.urlopen('https://example.org/', timeout=5)", "example.org"),
]
REFUSED_IPV6 = [
    ("socket.create_connection(('2001:db8::1', 80), timeout=5)", "2001:db8::1"),
    (f"{TCP6}.connect(('2001:db8::1', 80))", "2001:db8::1"),
    (f"{TCP6}.connect(('2001:db8::1', 80, 0, 0))", "2001:db8::1"),
    ("asyncio.run(asyncio.open_connection('2001:db8::1', 80))", "2001:db8::1"),
]


def has_ipv6():
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def environment(pythonpath=FOLDER):
    # A proxy would hide from urllib's errors which host was asked for.
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    kept.pop("PYTHONPATH", None)
    return kept if pythonpath is None else kept | {"PYTHONPATH": str(pythonpath)}


def run(script, pythonpath=FOLDER, cwd=None, *, status=0):
    """Return what a Python process of its own prints; it ends with this exit status."""
    imports = "import asyncio, socket, subprocess, sys, urllib.request\n"
    process = subprocess.run(
        [sys.executable, "-c", imports + script],
        env=environment(pythonpath),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert process.returncode == status, process.stderr
    assert ("refused to reach" in process.stderr) == bool(status)
    return process.stdout.strip()


def outcome(statement, pythonpath=FOLDER):
    """Return what becomes of a statement in a program that catches its error."""
    return run(GUARD + REPORT.format(statement=statement), pythonpath, status=0 if pythonpath is None else 1)


def refusal(host):
    return f"PermissionError: the book runs without a network: refused to reach {host!r}"


# What is refused


ONE_BY_ONE = """
import contextlib, io, json, sitecustomize
for statement, program in json.loads({programs!r}).items():
    before = len(sitecustomize.refused)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(program)
    result = [statement, printed.getvalue().strip(), sitecustomize.refused[before:]]
    print(json.dumps(result, default=bytes.decode))
"""


@pytest.fixture(scope="module")
def outcomes():
    """Of each statement, tried in one process after another, what was printed and which hosts were refused."""
    statements = [statement for statement, _ in REFUSED + (REFUSED_IPV6 if has_ipv6() else [])]
    programs = json.dumps({statement: REPORT.format(statement=statement) for statement in statements})
    lines = run(GUARD + ONE_BY_ONE.format(programs=programs), status=1).splitlines()
    return {statement: (printed, refused) for statement, printed, refused in map(json.loads, lines)}


@pytest.mark.parametrize(
    ("statement", "host"), [*REFUSED, *(pytest.param(*case, marks=needs_ipv6) for case in REFUSED_IPV6)]
)
def test_other_machines_are_refused_by_name(outcomes, statement, host):
    printed, refused = outcomes[statement]
    assert set(refused) == {host}  # so that it would have failed its process
    if "urlopen" in statement:
        # urllib wraps every OSError in a URLError, whose text holds the first one's.
        assert re.fullmatch(r"URLError: <urlopen error the book runs without a network: refused to reach .*>", printed)
        assert host in printed
    else:
        assert printed.replace("b'", "'") == refusal(host)


@pytest.mark.parametrize(
    "call",
    ["connect(('192.0.2.1', 80))", "connect_ex(('192.0.2.1', 80))", "sendto(b'x', ('192.0.2.1', 53))"],
)
@pytest.mark.parametrize("kind", ["SOCK_STREAM", "SOCK_DGRAM"])
def test_refusals_come_before_the_operating_system_hears_of_it(kind, call):
    # The system gives a socket its own port no later than with its first packet.
    script = f"s = socket.socket(socket.AF_INET, socket.{kind})\n{REPORT.format(statement=f's.{call}')}"
    printed = run(f"{GUARD}{script}print(s.getsockname())", status=1)
    assert printed.splitlines() == [refusal("192.0.2.1"), "('0.0.0.0', 0)"]


@pytest.mark.parametrize(
    "statement",
    [
        "socket.socket().connect((name, 80))",
        "socket.socket().connect_ex((name, 80))",
        f"{UDP}.sendto(b'x', (name, 80))",
    ],
)
def test_names_are_refused_before_they_are_looked_up(statement):
    # CPython resolves the name in a socket's address before it raises the audit event, and asks a server on the way.
    # A label of more than 63 characters fits in no query, so that the resolver fails here without sending one.
    name = b"a" * 64 + b".example"
    printed = outcome(statement.replace("name", repr(name)))
    assert printed in (refusal(name), refusal(name.decode()))


def test_processes_that_a_process_starts_inherit_the_refusal():
    inner = GUARD + "import socket" + REPORT.format(statement="socket.socket().connect(('192.0.2.1', 80))")
    script = f"sys.exit(subprocess.run([sys.executable, '-c', {inner!r}]).returncode)"
    assert run(script, status=1) == refusal("192.0.2.1")


def test_threads_are_refused_too():
    script = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "reach = lambda: socket.socket().connect(('192.0.2.1', 80))\n"
    ) + REPORT.format(statement="ThreadPoolExecutor().submit(reach).result()")
    assert run(GUARD + script, status=1) == refusal("192.0.2.1")


# What works as ever


@pytest.mark.parametrize(
    ("listening", "asked"),
    [
        ("127.0.0.1", "127.0.0.1"),
        ("127.0.0.1", "localhost"),
        pytest.param("::1", "::1", marks=needs_ipv6),
    ],
)
@pytest.mark.parametrize("connect", ["socket.create_connection", "asyncio"])
def test_listeners_on_this_machine_are_reached(listening, asked, connect):
    family = socket.AF_INET6 if ":" in listening else socket.AF_INET
    with socket.create_server((listening, 0), family=family) as listener:
        address = (asked, listener.getsockname()[1])
        if connect == "asyncio":
            run(
                "async def greet():\n"
                f"    _, writer = await asyncio.open_connection{address}\n"
                "    writer.write(b'hello')\n"
                "    await writer.drain()\n"
                "asyncio.run(greet())"
            )
        else:
            run(f"{connect}({address}).sendall(b'hello')")
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(5) == b"hello"


@pytest.mark.parametrize(
    "send",
    ["sendto(b'hello', address)", "sendmsg([b'hello'], [], 0, address)", "connect(address); s.send(b'hello')"],
)
def test_datagrams_on_this_machine_arrive(send):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.settimeout(10)
        run(f"address = {listener.getsockname()}\ns = {UDP}\ns.{send}")
        assert listener.recv(5) == b"hello"


def test_messages_over_an_established_connection_need_no_address():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        run(f"socket.create_connection({listener.getsockname()}).sendmsg([b'hel', b'lo'])")
        listener.settimeout(10)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(5) == b"hello"


def test_unix_sockets_work(tmp_path):
    # By a relative path, for a Unix socket's path holds a hundred characters at most.
    script = (
        "listener = socket.socket(socket.AF_UNIX); listener.bind('door'); listener.listen()\n"
        "socket.socket(socket.AF_UNIX).connect('door')\n"
        "listener.accept()\n"
        "print('reached')"
    )
    assert run(script, cwd=tmp_path) == "reached"


def test_socket_pairs_work():
    assert run("a, b = socket.socketpair(); a.sendall(b'hello'); print(b.recv(5).decode())") == "hello"


# Notebooks


def cell_that_reaches(host):
    return GUARD + f"import socket\nsocket.create_connection(({host!r}, 80), timeout=5)"


def test_a_notebooks_kernel_reaches_its_front_end_and_no_other_machine():
    cells = [cell_that_reaches("192.0.2.1"), "1 + 1"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    client = nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3", allow_errors=True)
    client.execute(env=environment())
    (said, refused), (two,) = (cell.outputs for cell in notebook.cells)
    assert said.name == "stderr"
    assert f"{refused.ename}: {refused.evalue}" == refusal("192.0.2.1")
    assert two.data["text/plain"] == "2"


def pythonpath_of_make_test():
    # make itself expands its variables; under `make test` it would else take this for a part of that run.
    asked = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    printed = subprocess.run(
        ["make", "--dry-run", "--no-print-directory", "test"],
        cwd=ROOT,
        env=asked,
        capture_output=True,
        text=True,
        check=True,
    )
    commands = printed.stdout.replace("\\\n", " ").splitlines()
    (line,) = [line for line in commands if "--nbval" in line]
    (setting,) = [word for word in shlex.split(line) if word.startswith("PYTHONPATH=")]
    return setting.partition("=")[2]


def test_make_test_runs_the_notebooks_without_a_network():
    assert ROOT / pythonpath_of_make_test() == FOLDER


SAID = nbformat.v4.new_output("stream", name="stderr", text=refusal("192.0.2.1").partition(": ")[2] + "\n")
CAUGHT = nbformat.v4.new_output("stream", name="stdout", text=refusal("192.0.2.1") + "\n")


@pytest.fixture(scope="module")
def nbval(tmp_path_factory):
    """What nbval, run as by `make test`, prints of notebooks that catch the refusal and stored the one or the other."""
    # nbval starts a kernel in its notebook's folder, where a relative path leads nowhere.
    folder = tmp_path_factory.mktemp("notebooks")
    code = GUARD + "import socket" + REPORT.format(statement="socket.socket().connect(('192.0.2.1', 80))")
    for name, outputs in {"both": [SAID, CAUGHT], "silent": [CAUGHT]}.items():
        cell = nbformat.v4.new_code_cell(code, execution_count=1, outputs=outputs)
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), folder / f"{name}.ipynb")
    options = ["-q", "-rA", "-p", "no:cacheprovider", "--nbval", "--nbval-current-env"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(folder)],
        cwd=ROOT,
        env=environment(pythonpath_of_make_test()),
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout


def test_kernels_of_make_test_are_without_a_network_in_whatever_folder_they_start(nbval):
    assert re.search("^PASSED .*both.ipynb::Cell 0$", nbval, re.MULTILINE), nbval


def test_an_attempt_that_a_notebook_caught_fails_its_cell(nbval):
    assert re.search("^FAILED .*silent.ipynb::Cell 0", nbval, re.MULTILINE), nbval
    assert "stderr" in nbval


def test_an_attempt_that_a_test_caught_fails_it(tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    code = """
def test_before():
    pass

def test_reaching():
    try: socket.socket().connect(('192.0.2.1', 80))
    except OSError: pass

def test_after():
    pass
"""
    (tmp_path / "test_reaching.py").write_text(f"{GUARD}import socket\n{code}", encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    ).stdout
    assert re.findall(r"^ERROR test_reaching\.py::(\w+)", printed, re.MULTILINE) == ["test_reaching"], printed
    assert "3 passed, 1 error" in printed
    assert "the test tried to reach ['192.0.2.1']" in printed


# Controls


def test_without_the_folder_on_the_path_there_is_no_hook():
    script = "print(getattr(sys.modules.get('sitecustomize'), '__file__', ''))"
    assert run(script, pythonpath=None) != str(FOLDER / "sitecustomize.py")
    assert run(script) == str(FOLDER / "sitecustomize.py")


@pytest.mark.parametrize(
    ("statement", "event"),
    [
        ("socket.create_connection(('192.0.2.1', 80), timeout=5)", "socket.getaddrinfo"),
        ("socket.socket().connect(('192.0.2.1', 80))", "socket.connect"),
        (f"{UDP}.sendto(b'x', ('192.0.2.1', 53))", "socket.sendto"),
    ],
)
def test_without_the_hook_only_the_guard_of_these_tests_stops_a_connection(statement, event):
    assert outcome(statement, pythonpath=None) == f"ConnectionAbortedError: the guard stopped {event}"
