"""Put this folder on ``PYTHONPATH``, and no Python process or notebook kernel reaches anything but this machine.

An attempt counts even if the program catches its error: it is said on stderr, which nbval compares with what a cell
stores, tests/conftest.py fails the test in which it was made, and the process ends with an error.
"""

import atexit
import ipaddress
import os
import socket
import sys

refused = []  # every host that was asked for, for tests to look at

# Which argument of an audited look-up names the host, or is an address whose first entry does.
LOOK_UPS = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
CONNECTING = ("connect", "connect_ex", "sendto", "sendmsg")


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _require_local(address):
    # A path is a Unix socket, and no address that of an established connection.
    host = address[0] if isinstance(address, tuple) else None
    if not _is_local(host):
        refused.append(host)
        message = f"the book runs without a network: refused to reach {host!r}"
        print(message, file=sys.stderr, flush=True)
        raise PermissionError(message)


def _refuse_network(event, arguments):
    if event in LOOK_UPS:
        _require_local(arguments[0] if isinstance(arguments[0], tuple) else (arguments[0],))
    elif event.removeprefix("socket.") in CONNECTING:
        _require_local(arguments[1])


def _checked_first(name):
    """Look at the address before Python does: it resolves a host's name before the audit hook hears of it."""
    original = getattr(socket.socket, name)

    def method(self, *arguments):
        _require_local(arguments[-1] if arguments else None)
        return original(self, *arguments)

    method.__name__ = name
    return method


def _fail_if_refused():
    if refused:
        sys.stdout.flush()
        os._exit(1)  # an exit function cannot set the status otherwise


atexit.register(_fail_if_refused)  # before any other, so that it runs behind all others
sys.addaudithook(_refuse_network)
for _name in CONNECTING:
    setattr(socket.socket, _name, _checked_first(_name))
