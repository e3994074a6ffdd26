"""Put this folder on ``PYTHONPATH``, and no Python process or notebook kernel reaches anything but this machine."""

import ipaddress
import sys

CONNECTING = {"socket.connect", "socket.sendto", "socket.sendmsg"}


def _is_local(host):
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host is None or host in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _refuse_network(event, arguments):
    if event in CONNECTING:
        address = arguments[1]
        # A path is a Unix socket, and no address that of an established connection.
        host = address[0] if isinstance(address, tuple) else None
    elif event == "socket.getaddrinfo":
        host = arguments[0]
    else:
        return
    if not _is_local(host):
        raise PermissionError(f"the book runs without a network: refused to reach {host!r}")


sys.addaudithook(_refuse_network)
