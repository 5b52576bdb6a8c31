"""The inside of a helper process: it answers messages until its parent is gone."""

from __future__ import annotations

import json
import os
import queue
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Message = dict[str, Any]
#: Answers a message and its open files, which it closes. The files that it returns are closed after it.
Work = Callable[[Message, list[int]], tuple[Message, Sequence[int]]]

_PIECE = 1 << 20


def serve(work: Work, *, stack_bytes: int = 0) -> None:
    """Answer the messages that come over the socket at standard input. Never returns.

    Args:
        work: is called on one thread; an exception ends the process.
        stack_bytes: of that thread; 0 for the usual size.
    """
    # Ctrl-C goes to the whole process group; this process ends with its parent's socket.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    inbox: queue.SimpleQueue[tuple[Message, list[int]]] = queue.SimpleQueue()
    parent = socket.socket(fileno=sys.stdin.fileno())
    threading.stack_size(stack_bytes)
    threading.Thread(target=_work, args=(parent, inbox, work), daemon=True).start()
    # This thread only receives: the process learns that its parent is gone even while its work doesn't end.
    for message in _received(parent):
        inbox.put(message)
    os._exit(0)


def guarded(work: Work, refusal: type[Exception]) -> Work:
    """``work`` that takes the message ``{"memory": bytes}`` too, and answers ``{"error": reason}`` where it
    raises ``refusal``."""

    def answer(message: Message, files: list[int]) -> tuple[Message, Sequence[int]]:
        if "memory" in message:
            limit_memory(message["memory"])
            return {}, []
        try:
            return work(message, files)
        except refusal as error:
            return {"error": str(error)}, []

    return answer


def limit_memory(room: int) -> None:
    """Let this process have ``room`` bytes of address space beyond those that it has now."""
    with open("/proc/self/statm") as statm:
        used = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))


def _work(parent: socket.socket, inbox: queue.SimpleQueue[tuple[Message, list[int]]], work: Work) -> None:
    try:
        while True:
            answer, made = work(*inbox.get())
            line = json.dumps(answer).encode() + b"\n"
            parent.sendall(line[:-1])
            socket.send_fds(parent, [line[-1:]], list(made))
            for descriptor in made:
                os.close(descriptor)
    finally:
        # The main thread waits for messages and would never learn that nobody answers any more.
        os._exit(1)


def _received(parent: socket.socket) -> Iterator[tuple[Message, list[int]]]:
    line = bytearray()
    while True:
        data, files, _, _ = socket.recv_fds(parent, _PIECE, 1)
        if not data:
            return
        line += data
        if line.endswith(b"\n"):
            yield json.loads(line), files
            line = bytearray()
        else:
            assert not files, "a file comes with the end of its line"
