"""gunicorn's settings: one worker that holds the engine, and threads for its requests.

TERM lets running requests finish; HUP makes the worker read voices.json again, without touching the engine.
"""

import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
import uuid
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from gunicorn import util

from settings import Settings
from vllm_engine import children, descendants

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
# malloc.h: what is freed goes back to the system, but for what every utterance asks for again: to have that anew, page
# by page, costs 1 to 2 % of a minute's time.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
RESERVE_THREADS = 128  # beyond the admitted requests: /health, and clients slow to send their request
LEAVE_S = 5  # for running requests to be told, after their engine died
RETRY_LOAD_S = 60  # what keeps a replacement from loading may pass: a GPU gives a killed process's memory back late
HEADERS_TIMEOUT_S = 15  # for a request's headers
LINGER_S = 2  # for the request of a silent connection while draining; gunicorn gives a kept-alive one as long
reading_headers = {}  # by thread: the socket, and until when

libc = ctypes.CDLL(None)
libc.mallopt(M_ARENA_MAX, 2)
libc.mallopt(M_MMAP_THRESHOLD, 1 << 20)
libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
settings = Settings.from_env()

host = os.environ.get("HOST", "127.0.0.1")
bind = f"{f'[{host}]' if ':' in host else host}:{os.environ.get('PORT', '6006')}"
chdir = str(Path(__file__).resolve().parent)
workers = 1
worker_class = "gthread"
threads = settings.queue_requests + RESERVE_THREADS
worker_connections = 4 * threads
worker_tmp_dir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
keepalive = 65  # seconds; longer than a proxy keeps its side
timeout = 120  # seconds without a heartbeat of the worker's main loop; requests may take longer
graceful_timeout = settings.drain_timeout_s
control_socket_disable = True  # it would write into the home folder
forwarder_headers = ""  # no client on this machine, nor behind a proxy here, says what SCRIPT_NAME is
accesslog = "-"
access_log_format = (
    '%(h)s "%(m)s %({speech.path}e)s" %(s)s %(B)sB %(L)ss id=%({x-request-id}o)s voice=%({speech.voice}e)s'
    " characters=%({speech.characters}e)s audio_s=%({speech.audio_s}e)s rtf=%({speech.rtf}e)s text=%({speech.text}e)s"
)


def on_starting(server):
    """Refuse --preload: what the service starts, threads and vLLM's loop, would stay behind in the master."""
    if server.cfg.preload_app:
        raise SystemExit("gunicorn's preload_app (--preload) does not do here: start it without")


def when_ready(server):
    """Let HUP mean the voices: gunicorn's own reload would load a second engine beside the first.

    What a killed worker leaves behind becomes this process's child, so that end_orphans finds it.
    """
    server.reload = lambda: [os.kill(pid, signal.SIGHUP) for pid in server.WORKERS]
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)


def child_exit(server, worker):
    """End the engine processes that a worker left behind, with the GPU memory they hold."""
    orphans = [each for pid in children(os.getpid()) if pid not in server.WORKERS for each in (pid, *descendants(pid))]
    for pid in orphans:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def post_fork(server, worker):
    """Put HUP off until post_worker_init: gunicorn would have it end a worker that boots."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})


def post_worker_init(worker):
    """Load the engine in the background, now that the worker is forked and its routes answer."""
    service = worker.wsgi.extensions["speech"]
    worker.set_accept_enabled = partial(accept, worker, worker.set_accept_enabled)
    worker.handle = partial(handle, worker.handle)
    util.write_error = write_error
    threading.Thread(target=end_slow_headers, name="slow-headers", daemon=True).start()
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=service.reload_voices, daemon=True).start())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    service.on_death = leave
    service.retry_load_s = RETRY_LOAD_S if worker.age > 1 else None  # of the first, its starter is told why
    service.start()


def handle(gunicorn_handle, conn):
    """Serve a connection's next request; end_slow_headers ends it while its headers are still coming.

    A connection is closed here: gunicorn would linger on it for two seconds in the loop that accepts the others.
    """
    thread = threading.get_ident()
    reading_headers[thread] = (conn.sock, time.monotonic() + HEADERS_TIMEOUT_S)
    try:
        goes_on = gunicorn_handle(conn)
    finally:
        reading_headers.pop(thread, None)
    if not goes_on:
        conn.close(graceful=True)
        conn.close = lambda graceful=False: None
    return goes_on


def write_error(sock, status, reason, message):
    """Answer what never became a request with the envelope too, not with gunicorn's page."""
    request_id = f"req_{uuid.uuid4().hex}"
    kind = "invalid_request_error" if status < 500 else "server_error"
    told = {"message": f"{reason}: {message}" if message else reason, "type": kind, "param": None, "code": None}
    body = json.dumps({"error": told}).encode()
    head = (
        f"HTTP/1.1 {status} {reason}\r\nConnection: close\r\nContent-Type: application/json\r\n"
        f"x-request-id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    util.write_nonblock(sock, head.encode("latin-1") + body)


def pre_request(worker, req):
    """The headers are there."""
    reading_headers.pop(threading.get_ident(), None)


def end_slow_headers():
    """Hang up on clients that hold a thread with half a request: gunicorn alone would wait for ever."""
    while True:
        time.sleep(1)
        for client, deadline in list(reading_headers.values()):
            if time.monotonic() > deadline:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)


def leave():
    """End a worker whose engine died, once its running requests are answered; gunicorn starts another."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LEAVE_S)
    os._exit(1)


def accept(worker, set_accept_enabled, enabled):
    """Accept connections or not, as gunicorn says; once draining, refuse them: gunicorn alone would let them hang.

    It would also wait for those that have said nothing yet, a browser's or a pool's, as long as they are kept alive.
    """
    set_accept_enabled(enabled)
    if not worker.alive:
        for listener in worker.sockets:
            listener.close()
        for silent in worker.pending_conns:
            silent.timeout = min(silent.timeout, time.monotonic() + LINGER_S)


def worker_exit(server, worker):
    """Let go of the engine, if it came so far.

    While it still loads, the process ends at once: Python ends a thread inside onnxruntime in a way that aborts it.
    """
    if app := getattr(worker, "wsgi", None):
        service = app.extensions["speech"]
        loading = worker.booted and service.trouble == "loading"
        service.close()
        if loading:
            os._exit(0)
