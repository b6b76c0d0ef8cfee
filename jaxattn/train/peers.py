"""Who is still there: a TCP connection between process 0 and every other, which breaks when one of them dies.

The kernel closes the connections of a killed process at once, and keep-alive probes find a machine that is gone; no
thread of ours has to be punctual. Process 0 tells the others whom it lost, and all of them end: a collective without
one of its members would wait forever.
"""

import contextlib
import os
import secrets
import socket
import sys
import threading
from collections.abc import Callable

ENDED = 1  # exit status of a process that lost another


def lost(process: int, host: str):
    """Says who is gone, and ends this process."""
    said = f"jaxattn: lost process {process} (on {host}): killed, failed or cut off; its own output may say why"
    print(f"{said}\njaxattn: this process ends too; --resume goes on from the last checkpoint", file=sys.stderr)
    end()


def end():
    """Ends this process as a failure, at once: an orderly shutdown would wait for the process that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ENDED)


class Peers:
    """One process's part of the watch; `finish` waits until every process calls it.

    Process 0 listens, and gives `publish` the text that the others need to join; they get it from `find`.
    """

    def __init__(self, process: int, processes: int, publish: Callable[[str], None], find: Callable[[], str]):
        self.lost = lost  # replaced when this process fails by itself, and should say that alone
        self.connections: dict[int, socket.socket] = {}
        self.server: socket.socket | None = None
        self.processes = processes
        self.finished = threading.Semaphore(0)  # raised once by every peer that says bye
        if process == 0:
            self.server = server = socket.create_server(("", 0))
            self.token = secrets.token_hex(16)
            _in_background(self._accept, server)
            publish(f"{server.getsockname()[1]} {self.token} {socket.gethostname()}")
        else:
            self._join(process, find())

    def finish(self):
        """Returns when all processes have come here, however long the slowest takes; ends this one if one is lost."""
        if 0 in self.connections:
            _send(self.connections[0], "bye")
            self.finished.acquire()
        else:
            for _ in range(self.processes - 1):
                self.finished.acquire()
            for connection in self.connections.values():
                _send(connection, "bye")
        self.close()

    def close(self):
        """Ends the watch, and tells nobody of it."""
        connections, self.connections = self.connections, {}
        for connection in (*connections.values(), *([self.server] if self.server else [])):
            with contextlib.suppress(OSError):  # the other side may be closed already
                connection.shutdown(socket.SHUT_RDWR)  # wakes the threads that read from it, as close does not
            connection.close()

    def _join(self, process: int, published: str):
        """Connects to process 0; `published` ends in what it published, after its address."""
        address, port, token, host = published.split()
        connection = _watched(socket.create_connection((address, int(port)), timeout=60))
        _send(connection, f"{token} {process} {socket.gethostname()}")
        self.connections[0] = connection
        _in_background(self._listen, connection, 0, host)

    def _accept(self, server: socket.socket):
        with contextlib.suppress(OSError):  # until the server is closed
            while True:
                _in_background(self._greet, _watched(server.accept()[0]))

    def _greet(self, connection: socket.socket):
        token, process, host = (_receive(connection).split() + [""] * 3)[:3]
        if token != self.token:  # a stranger
            connection.close()
            return
        self.connections[int(process)] = connection
        self._listen(connection, int(process), host)

    def _listen(self, connection: socket.socket, process: int, host: str):
        """The one line that a peer sends: that it finished, that another is lost, or nothing if it is gone itself."""
        line = _receive(connection)
        if line == "bye":
            self.finished.release()
            return
        if line.startswith("lost "):  # from process 0, the only one that knows of all
            _, number, host = line.split()
            process = int(number)
        elif process != 0:
            for other in [peer for number, peer in self.connections.items() if number != process]:
                _send(other, f"lost {process} {host}")
        self.lost(process, host)


def _in_background(function: Callable[..., None], *arguments: object):
    threading.Thread(target=function, args=arguments, daemon=True).start()


def _watched(connection: socket.socket) -> socket.socket:
    """Probed by the kernel: broken after some 20 s without a sign of life of the other machine."""
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if sys.platform != "darwin":  # which has no TCP_KEEPIDLE
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    return connection


def _send(connection: socket.socket, line: str):
    with contextlib.suppress(OSError):  # whoever listens on this connection notices
        connection.sendall(f"{line}\n".encode())


def _receive(connection: socket.socket) -> str:
    """The next line; empty if the connection broke before its end."""
    try:
        with connection.makefile("rb") as lines:
            line = lines.readline(200)
    except OSError:
        return ""
    return line.decode(errors="replace").strip() if line.endswith(b"\n") else ""
