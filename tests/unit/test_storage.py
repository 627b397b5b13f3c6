"""Proves that a Folder does the same on a local disk, in memory, on a real S3 server, on a web server, and on Google's
storage where its emulator is installed (`pip install gcsfs gcp-storage-emulator`); that a network that fails in any way is
asked again, and if it goes on failing is one sentence, soon; that a failure is never taken for a file that is not there;
and that no error shows a credential.

    python -m pytest tests/unit/test_storage.py
"""

import errno
import importlib.util
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid

import pytest

from sivae.errors import UserError
from sivae.storage import Folder
from tests import proxy as faults
from tests.processes import ROOT, SLACK_SEC, environment
from tests.proxy import FAILURES, WRONG, FileServer, Proxy, address, free_port, object_store, s3_options, wait_for_port

SECRET = "wJalrXUtnFEMIK7MDENG"


@pytest.fixture(scope="module")
def s3():
    with object_store("storage") as options:
        yield options


@pytest.fixture(scope="module")
def gs():
    """A Google Cloud Storage emulator with a bucket `storage`; only where it and gcsfs are installed."""
    command = shutil.which("gcp-storage-emulator", path=os.path.dirname(sys.executable))  # beside this Python
    if command is None or importlib.util.find_spec("gcsfs") is None:
        pytest.skip("needs gcsfs and gcp-storage-emulator")
    port, patch = free_port(), pytest.MonkeyPatch()
    patch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC what the emulator does not know
    arguments = ["start", "--host", "127.0.0.1", "--port", str(port), "--in-memory", "--default-bucket", "storage"]
    process = subprocess.Popen([command, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for_port(port)
    yield {"token": "anon"}
    process.kill()
    process.wait()
    patch.undo()


@pytest.fixture(params=["local", "memory", "s3", "gs"])
def folder(request, tmp_path):
    name = uuid.uuid4().hex
    if request.param == "gs":
        return Folder(f"gs://storage/{name}", request.getfixturevalue("gs"))
    if request.param == "s3":
        return Folder(f"s3://storage/{name}", request.getfixturevalue("s3"))
    return Folder(tmp_path / "folder" if request.param == "local" else f"memory://{name}")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A web server of a folder with a file `a.tar` and a file `sub/b`."""
    path = tmp_path_factory.mktemp("files")
    (path / "sub").mkdir()
    (path / "a.tar").write_bytes(bytes(range(256)) * 40)
    (path / "sub" / "b").write_bytes(b"b")
    server = FileServer(path)
    yield server
    server.kill()


@pytest.fixture
def between(files):
    proxy = Proxy(files.address)
    yield proxy
    proxy.close()


def all_good(i, data):
    return None


def test_write_read_list_and_delete(folder, tmp_path):
    assert folder.names() == [] and folder.names("sub") == []
    assert not folder.exists("a") and folder.size("a") is None
    folder.remove("a")  # nothing there, nothing happens
    folder.write(b"first", "sub", "a")
    folder.write(b"second!", "sub", "a")
    folder.write(b"", "empty")
    assert folder.read("sub", "a") == b"second!" and folder.read("empty") == b""
    assert folder.size("sub", "a") == 7 and folder.size("empty") == 0
    assert folder.exists("sub", "a") and folder.names() == ["empty", "sub"] and folder.names("sub") == ["a"]
    (tmp_path / "local file").write_bytes(b"uploaded")
    folder.upload(str(tmp_path / "local file"), "new", "c")
    assert folder.read("new", "c") == b"uploaded"
    folder.remove("sub")
    assert not folder.exists("sub", "a") and folder.names() == ["empty", "new"]
    folder.remove("empty")
    assert folder.names() == ["new"]
    for name in ("a[1]", "a1"):
        folder.write(b"", name, "file")
    folder.remove("a[1]")
    assert folder.names() == ["a1", "new"], "a name is no pattern"
    with pytest.raises(UserError, match="sub/a: cannot read, there is no such file"):
        folder.read("sub", "a")


def test_what_another_has_changed_is_seen(folder):
    other = folder.folder()
    other.write(b"1", "sub", "a")
    assert folder.names("sub") == ["a"]
    other.write(b"22", "sub", "b")
    assert folder.exists("sub", "b") and folder.names("sub") == ["a", "b"]
    other.write(b"333", "sub", "c")
    assert folder.size("sub", "c") == 3 and folder.names("sub") == ["a", "b", "c"]
    other.write(b"4444", "sub", "d")
    assert folder.names("sub") == ["a", "b", "c", "d"]
    other.write(b"55555", "sub", "a")
    assert folder.read("sub", "a") == b"55555" and folder.size("sub", "a") == 5
    other.remove("sub", "a")
    assert not folder.exists("sub", "a") and folder.names("sub") == ["b", "c", "d"]


def test_ranges(folder):
    folder.write(bytes(range(100)), "a")
    folder.backoff_sec, seen = 0.01, []

    def check(i, data):
        seen.append(i)
        return "wrong" if i == 1 else None

    found, problems = folder.read_ranges([("a", 3, 7), ("a", 0, 2), ("b", 0, 1), ("a", None, None)], check)
    assert found == [bytes([3, 4, 5, 6]), b"", b"", bytes(range(100))]
    assert problems[0] == (1, "wrong") and isinstance(problems[1][1], FileNotFoundError) and len(problems) == 2
    assert seen.count(1) == folder.attempts and seen.count(0) == 1, "only what is wrong is asked for again"
    folder.outage_sec, start = 60, time.monotonic()
    folder.read_ranges([("a", 200, 210), ("a", 0, 2)], lambda i, data: "wrong")
    assert time.monotonic() - start < SLACK_SEC, "what a store answers is no outage"
    folder.backoff_sec, start = 10, time.monotonic()
    folder.read_ranges([("a", 3, 7), ("b", 0, 1)], all_good)
    assert time.monotonic() - start < 5, "what is good or cannot be helped is not waited for"


def test_a_folder_goes_to_another_process(folder):
    folder.write(b"x", "a")
    folder.read_ranges([("a", 0, 1)], all_good)  # a local file stays open
    again = pickle.loads(pickle.dumps(folder))
    assert again._opened is None and not again._descriptors and again.read("a") == b"x"


def test_more_files_than_descriptors_are_kept(tmp_path):
    folder = Folder(tmp_path)
    for i in range(300):
        (tmp_path / str(i)).write_bytes(bytes([i % 256]))
    before = len(os.listdir("/proc/self/fd"))
    found, problems = folder.read_ranges([(str(i), 0, 1) for i in range(300)], all_good)
    assert found == [bytes([i % 256]) for i in range(300)] and not problems
    assert len(os.listdir("/proc/self/fd")) - before <= 256
    del folder
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_file_that_was_replaced_on_a_network_mount(tmp_path, monkeypatch):
    """The descriptor of the one before is of no use there any more."""
    folder, real = Folder(str(tmp_path)), os.pread
    folder.write(b"before", "a")
    assert folder.read_ranges([("a", 0, 3)], all_good) == ([b"bef"], [])
    [old] = folder._descriptors.values()
    inode = os.fstat(old).st_ino

    def pread(descriptor, *place):
        if os.fstat(descriptor).st_ino == inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(descriptor, *place)

    monkeypatch.setattr(os, "pread", pread)
    _, [(_, problem)] = folder.read_ranges([("a", 0, 3)], all_good)
    assert problem.errno == errno.ESTALE
    folder.write(b"after", "a")
    assert folder.read_ranges([("a", 0, 3), ("a", None, None)], all_good) == ([b"aft", b"after"], [])


def test_a_write_that_fails_leaves_nothing(tmp_path):
    """The kernel ends the write in its middle, as a full disk does."""
    code = "import sys; from sivae.storage import Folder; Folder(sys.argv[1]).write(bytes(10**6), 'a')"

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, env=environment(), preexec_fn=limit, capture_output=True
    )
    assert b"a: cannot write, the disk is full" in done.stderr and not os.listdir(tmp_path)


# A web server


def test_the_web(files):
    folder = Folder(files.url, timeout_sec=10)
    assert folder.read("sub", "b") == b"b" and folder.size("a.tar") == 10240 and folder.exists("a.tar")
    assert not folder.exists("c") and folder.size("c") is None and folder.names("c") == []
    assert folder.names("sub") == ["b"] and {"a.tar", "sub"} <= set(folder.names())
    assert folder.read_ranges([("a.tar", 254, 258)], all_good) == ([bytes([254, 255, 0, 1])], [])
    with pytest.raises(UserError, match="cannot write"):
        folder.write(b"x", "c")


@pytest.mark.parametrize("ask", ["exists", "size", "names", "read"])
def test_a_failure_is_not_taken_for_a_missing_file(files, between, ask):
    absent = Folder(f"http://127.0.0.1:{free_port()}", timeout_sec=2, retries=0)
    with pytest.raises(UserError, match="http://127.0.0.1"):
        getattr(absent, ask)("a.tar")
    folder = Folder(between.url, timeout_sec=2, retries=1, backoff_sec=0.01)
    between.disturb(faults.ERROR_500, match="", method=None)
    with pytest.raises(UserError, match="a.tar: cannot .*tried 2 times"):
        getattr(folder, ask)("a.tar")


@pytest.mark.parametrize("ask", ["exists", "size", "names", "read"])
def test_a_failure_of_a_disk_is_not_taken_for_a_missing_file(tmp_path, ask):
    """A link to itself fails for everybody, root too, with neither of the errors that say that nothing is there."""
    os.symlink("a", tmp_path / "a")
    with pytest.raises(UserError, match="a/b: cannot .*symbolic links"):
        getattr(Folder(str(tmp_path)), ask)("a", "b")


# What a network does


@pytest.mark.parametrize("fault", [*FAILURES, WRONG])
def test_ranges_heal(between, fault):
    folder = Folder(between.url, timeout_sec=0.4, retries=2, backoff_sec=0.01)
    whole = bytes(range(256)) * 40
    between.disturb(fault, times=2)
    ranges = [("a.tar", 1000, 1400)]
    found, problems = folder.read_ranges(ranges, lambda i, data: None if data == whole[1000:1400] else "wrong")
    assert found == [whole[1000:1400]] and not problems and between.times == 0
    assert len(between.reads()) == 3


@pytest.mark.parametrize("fault", FAILURES)
def test_a_failure_that_stays_is_told_in_time(between, fault):
    folder = Folder(between.url, timeout_sec=0.4, retries=1, backoff_sec=0.01)
    between.disturb(fault)
    start = time.monotonic()
    _, problems = folder.read_ranges([("a.tar", 1000, 1400)], lambda i, data: None if len(data) == 400 else "wrong")
    assert len(problems) == 1 and time.monotonic() - start < folder.patience_sec + SLACK_SEC
    if fault not in (faults.WHOLE_FILE, faults.SHORT, faults.SHORT_WITHOUT_LENGTH):  # nothing says that these are wrong
        start = time.monotonic()
        with pytest.raises(UserError, match=r"a.tar: cannot read \(.*tried 2 times") as raised:
            folder.read("a.tar")
        assert ("no answer in time" in str(raised.value)) == (fault in (faults.STALL, faults.STALL_BEFORE))
        assert time.monotonic() - start < folder.patience_sec + SLACK_SEC


def test_one_that_is_slow_does_not_lose_the_others(between):
    between.disturb(faults.STALL, times=1)
    folder = Folder(between.url, timeout_sec=SLACK_SEC, retries=1, backoff_sec=0.01)
    ranges = [("a.tar", i, i + 1) for i in range(20)]
    found, problems = folder.read_ranges(ranges, lambda i, data: None if len(data) == 1 else "wrong")
    assert not problems, (problems, [request.span for request in between.reads()])
    assert found == [bytes([i]) for i in range(20)] and len(between.reads()) == 21


@pytest.mark.parametrize("fault", [faults.STALL, faults.STALL_BEFORE])
def test_what_is_given_up_holds_no_connection(s3, fault):
    """An S3 client has ten."""
    Folder("s3://storage/connections", s3).write(bytes(1000), "a.tar")
    proxy = Proxy(address(s3))
    try:
        through = s3_options(("127.0.0.1", proxy.port))
        folder = Folder("s3://storage/connections", through, timeout_sec=0.8, retries=3, backoff_sec=0.01)
        proxy.disturb(fault, times=12)
        found, problems = folder.read_ranges([("a.tar", i, i + 5) for i in range(8)], all_good)
        assert found == [bytes(5)] * 8 and not problems and proxy.times == 0
    finally:
        proxy.close()


def test_what_another_try_cannot_help_is_not_tried_again(between):
    folder = Folder(between.url, timeout_sec=SLACK_SEC, retries=4, backoff_sec=SLACK_SEC)
    start = time.monotonic()
    with pytest.raises(UserError, match="there is no such file"):
        folder.read("none.tar")
    assert len(between.reads()) == 1 and time.monotonic() - start < SLACK_SEC


@pytest.mark.parametrize("fault", [faults.ERROR_500, faults.CUT_BEFORE])
def test_writes_to_an_object_store_are_tried_again(s3, tmp_path, fault):
    proxy = Proxy(address(s3))
    try:
        folder = Folder("s3://storage/writes", s3_options(("127.0.0.1", proxy.port)), backoff_sec=0.01)
        (tmp_path / "c").write_bytes(b"uploaded")
        proxy.disturb(fault, times=1, match="", method="PUT")
        folder.write(b"written", "b")
        proxy.disturb(fault, times=1, match="", method="PUT")
        folder.upload(str(tmp_path / "c"), "c")
        assert folder.read("b") == b"written" and folder.read("c") == b"uploaded"
    finally:
        proxy.close()


def test_a_server_that_is_killed_and_comes_back(files):
    folder = Folder(files.url, timeout_sec=5, retries=5, backoff_sec=0.3)
    assert folder.read("sub", "b") == b"b"
    files.kill()
    try:
        with pytest.raises(UserError, match="sub/b: cannot read"):
            Folder(files.url, timeout_sec=5, retries=0).read("sub", "b")
    finally:
        files.start(wait=False)
    assert folder.read("sub", "b") == b"b", "the connection that was open is not what is asked again"


def test_an_outage_is_waited_for_once(files, caplog):
    """Longer than the attempts take, but not for ever, and not again by what comes after."""
    folder = Folder(files.url, timeout_sec=5, retries=1, backoff_sec=0.01, outage_sec=30)
    files.kill()
    back = threading.Timer(1.0, files.start, kwargs={"wait": False})
    back.start()
    assert folder.read("sub", "b") == b"b" and folder.read_ranges([("a.tar", 0, 2)], lambda i, data: None)[0] == [
        b"\0\1"
    ]
    back.join()
    (line,) = caplog.messages
    assert line.startswith(f"{files.url}: no answer (") and line.endswith("asking for another 30 s")
    folder.outage_sec = 0.5
    files.kill()
    try:
        start = time.monotonic()
        problems = folder.read_ranges([("a.tar", 0, 2)], lambda i, data: None)[1]
        assert len(problems) == 1 and 0.5 <= time.monotonic() - start < folder.patience_sec + SLACK_SEC
        start = time.monotonic()
        with pytest.raises(UserError, match="tried 2 times"):
            folder.read("sub", "b")
        assert time.monotonic() - start < 0.5
    finally:
        files.start(wait=False)


# Credentials


def test_credentials_from_the_environment(s3, monkeypatch):
    Folder("s3://storage/environment", s3).write(b"x", "a")
    host, port = address(s3)
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert Folder("s3://storage/environment").read("a") == b"x"


@pytest.mark.parametrize(
    "url, options",
    [
        ("s3://nowhere/a", {"key": SECRET, "secret": SECRET, "client_kwargs": {"endpoint_url": "ENDPOINT"}}),
        ("s3://storage/a", {"key": SECRET, "secret": SECRET, "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"}}),
        ("s3://storage/a", {"key": SECRET, "secret": SECRET, "token": 5, "client_kwargs": {"no_such_option": SECRET}}),
        ("s3://storage/a", {"key": SECRET, "secret": SECRET, "config_kwargs": {"nothing": SECRET}}),
        (f"http://me:{SECRET}@127.0.0.1:9/a", {}),
        (f"WEB_WITH/{SECRET}", {"client_kwargs": {"nothing": SECRET}}),
        (f"http://me:{SECRET}@nowhere.invalid/a", {}),
        ("http://127.0.0.1:9/a", {"client_kwargs": {"headers": {"Authorization": SECRET}}}),
        (f"nosuchprotocol://me:{SECRET}@host/a", {}),
        (f"ftp://me:{SECRET}@127.0.0.1:9/a", {}),
    ],
)
def test_no_error_shows_a_credential(s3, files, url, options):
    if "ENDPOINT" in str(options):
        options = options | {"client_kwargs": s3["client_kwargs"]}
    url = url.replace(f"WEB_WITH/{SECRET}", files.url.replace("//", f"//me:{SECRET}@"))
    folder = Folder(url, options, timeout_sec=0.5, retries=0)

    def ranges():
        for _, problem in folder.read_ranges([("a", 0, 1)], all_good)[1]:
            raise UserError(folder.reason(problem))

    told = []
    for ask in (
        lambda: folder.read("a"), lambda: folder.names(), lambda: folder.exists("a"), lambda: folder.size("a"),
        lambda: folder.write(b"", "a"), lambda: folder.remove("a"), ranges,
    ):  # fmt: skip
        try:
            ask()
        except UserError as error:
            told.append(str(error))
    assert told and SECRET not in str(told)


def test_what_a_driver_says_of_its_options_is_not_told_on():
    folder = Folder(
        "memory://a", {"token": SECRET, "client_kwargs": {"secret": f"{SECRET}2", "endpoint_url": "http://host"}}
    )
    text = folder.reason(FileNotFoundError(f"no token {SECRET}, {SECRET}2 at http://host"))
    assert SECRET not in text and "http://host" in text
