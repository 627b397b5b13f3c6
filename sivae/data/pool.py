"""One function over many jobs in worker processes that never outlive this one, with a count of what they did."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import forkserver

from sivae.errors import UserError

POLL_SEC = 0.1
_worker: tuple = ()  # in a worker process: (work, shared, the connection that counts)


def each(work: Callable, shared, jobs: list, num_workers: int, tick: Callable[[int], None], died: str) -> Iterator:
    """Yields work(shared, job, tick) for every job, in the order in which they end.

    work: a function of a module. shared: handed to every worker once, pickled. num_workers: processes, 0 works
    in this one. tick(n): called here after work called its own tick(n), with sums. died: what to tell the user
    when a worker is killed, by the kernel out of memory as a rule.

    Raises what work raises. The workers end at once when this generator is closed or fails, and when this
    process dies, however it does.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers == 0:
        yield from (work(shared, job, tick) for job in jobs)
        return
    with _stop_asked() as stop:
        yield from _each_in_workers(work, shared, jobs, num_workers, tick, died, stop)


def _each_in_workers(work, shared, jobs, num_workers, tick, died, stop) -> Iterator:
    context = _context(work.__module__)
    life, alive = context.Pipe(duplex=False)  # nobody writes: its other end closes with this process
    counts, count = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(num_workers, context, _start, (work, shared, life, count))

    def drain():
        while counts.poll():
            tick(counts.recv())

    try:
        waiting = {pool.submit(_run, job) for job in jobs}
        while waiting:
            if stop.is_set():
                raise KeyboardInterrupt
            done, waiting = wait(waiting, POLL_SEC, FIRST_COMPLETED)
            drain()
            for future in done:
                yield future.result()
        drain()
    except BrokenProcessPool:
        time.sleep(2 * POLL_SEC)  # a signal that ends all processes may be told to a worker first
        if stop.is_set():
            raise KeyboardInterrupt from None
        raise UserError(died) from None
    finally:
        alive.close()
        pool.shutdown(wait=True, cancel_futures=True)
        for connection in (life, counts, count):
            connection.close()


def _context(preload: str):
    """How workers are started: not by a fork of this process, which would inherit connections and locks of threads."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])  # imports once, not once a worker
    main_thread = threading.current_thread() is threading.main_thread()
    # The server inherits this: a Ctrl-C, which goes to all processes of a terminal, is the parent's alone
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
    try:
        forkserver.ensure_running()
    finally:
        if main_thread:
            signal.signal(signal.SIGINT, before)
    return context


@contextlib.contextmanager
def _stop_asked():
    """An event that Ctrl-C and SIGTERM set, for starting a process must not be torn apart by an exception."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    handlers = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def interruptible():
    """SIGTERM ends the work inside as Ctrl-C does, by KeyboardInterrupt; outside the main thread nothing changes."""

    def stop(number, frame):
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _start(work: Callable, shared, life, count):
    global _worker
    # Who asks a job to stop often signals every process of it; this one ends when its parent does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(life,), daemon=True).start()
    _worker = work, shared, count


def _end_with_parent(life):
    with contextlib.suppress(EOFError, OSError):
        life.recv_bytes()
    os._exit(1)


def _run(job):
    work, shared, count = _worker
    try:
        return work(shared, job, count.send)
    except UserError as error:  # of its subclasses the message is what counts, and it always arrives
        raise UserError(str(error)) from None
