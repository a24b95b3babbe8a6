"""download.py against a local server: resumed, verified, refused."""

import hashlib
import http.server
import os
import resource
import threading
import time

import pytest

from weights import download

BODY = bytes(range(256)) * 4000  # 1 MB
SHA256 = hashlib.sha256(BODY).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves BODY under every path, in the manner that the test sets."""

    ranges, cut, length, redirect, wrong_range = True, None, None, None, False
    endless, raw, pause = False, None, 0.0

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []

    def handle_error(self, *args):
        pass  # a client that hangs up, as some of these tests do


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server, asked = self.server, self.headers.get("Range")
        server.asked.append((self.path, asked))
        time.sleep(server.pause)
        if server.raw is not None:
            self.wfile.write(server.raw)
            self.close_connection = True
            return
        if server.redirect:
            self.send_response(302)
            self.send_header("Location", server.redirect)
            self.end_headers()
            return
        start = int(asked.split("=")[1].strip("-")) if asked and server.ranges else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            begin = 0 if server.wrong_range else start
            self.send_header("Content-Range", f"bytes {begin}-{len(BODY) - 1}/{len(BODY)}")
        length = len(BODY) - start if server.length is None else server.length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        while server.endless:
            self.wfile.write(BODY)
        self.wfile.write(BODY[start : server.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


def get(server, path, sha256=SHA256):
    download.download(server.url + "/x.pt", path, sha256)


def test_a_whole_file(server, tmp_path):
    get(server, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"], "the part is gone"


def test_interrupted_and_continued(server, tmp_path):
    server.cut = 300_000
    with pytest.raises(OSError, match="run again to continue"):
        get(server, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    assert (tmp_path / "x.pt.part").stat().st_size == 300_000
    server.cut = None
    get(server, tmp_path / "x.pt")
    assert server.asked[-1][1] == "bytes=300000-"
    assert (tmp_path / "x.pt").read_bytes() == BODY


def test_a_server_without_ranges_begins_again(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(BODY[:1000])
    server.ranges = False
    get(server, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == BODY


def test_a_server_that_sends_another_range(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(BODY[:1000])
    server.wrong_range = True
    with pytest.raises(OSError, match="another range"):
        get(server, tmp_path / "x.pt")


def test_a_part_of_something_else(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(b"x" * 1000)
    with pytest.raises(OSError, match="sha256"):
        get(server, tmp_path / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt.lock"], "a part that cannot become right is deleted"
    get(server, tmp_path / "x.pt")


def test_a_part_longer_than_the_file(server, tmp_path):
    (tmp_path / "x.pt.part").write_bytes(BODY + b"x")
    with pytest.raises(OSError, match="run again"):
        get(server, tmp_path / "x.pt")
    get(server, tmp_path / "x.pt")


def test_a_wrong_hash_is_never_seen(server, tmp_path):
    with pytest.raises(OSError, match="sha256"):
        get(server, tmp_path / "x.pt", "0" * 64)
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt.lock"]


def test_without_a_hash_the_size_counts(server, tmp_path):
    server.cut = len(BODY) - 1
    with pytest.raises(OSError, match="run again"):
        get(server, tmp_path / "x.pt", None)
    assert not (tmp_path / "x.pt").exists()
    server.cut = None
    get(server, tmp_path / "x.pt", None)
    assert (tmp_path / "x.pt").read_bytes() == BODY


def test_more_than_the_limit(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LARGEST_WITH_HASH", 1000)
    with pytest.raises(OSError, match="at most 1,000"):
        get(server, tmp_path / "x.pt")
    server.length = -1  # none stated
    with pytest.raises(OSError, match="more than 1,000"):
        get(server, tmp_path / "x.pt")


def test_no_length_stated(server, tmp_path):
    server.length = -1
    get(server, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == BODY


@pytest.mark.parametrize("target", ["ftp://127.0.0.1/x", "file:///etc/passwd", "https://127.0.0.1:1/x"])
def test_redirects_keep_the_scheme(server, tmp_path, target):
    server.redirect = target
    with pytest.raises(OSError, match="only http is followed|not allowed"):
        get(server, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


@pytest.mark.parametrize("stated", [-1, 2000])
def test_an_endless_body_ends(server, tmp_path, monkeypatch, stated):
    monkeypatch.setattr(download, "LARGEST_WITH_HASH", 3_000_000)
    server.endless, server.length = True, stated
    with pytest.raises(OSError, match="more than|expected"):
        get(server, tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 6_000_000


def test_a_body_that_is_too_long_leaves_nothing(server, tmp_path, monkeypatch):
    """OpenAI's releases are small: an endless body must not fill the disk up to Llip's limit."""
    monkeypatch.setattr(download, "LARGEST_WITH_HASH", 2_000_000)
    server.endless, server.length = True, -1
    with pytest.raises(OSError, match="more than 2,000,000 bytes; run again"):
        get(server, tmp_path / "x.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt.lock"]


ANSWERS = [
    b"",
    b"\x1b]0;owned\x07 nothing of the kind\r\n\r\n",
    b"HTTP/1.1 500 \x1b[2Jcleared\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\nxyz",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nxyz",
    b"HTTP/1.1 200 OK\r\nContent-Length: 9" + b"9" * 5000 + b"\r\n\r\nxyz",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nxyz\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\nxyz\r\n",
    b"HTTP/1.1 206 Partial\r\nContent-Range: bytes 7-9/10\r\n\r\nxyz",
    b"HTTP/1.1 416 No\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 1000 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://[::1\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: http://\x1b[2J/x\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: file:///etc/passwd\r\n\r\n",
    b"HTTP/1.1 302 Found\r\n\r\n",
]


@pytest.mark.parametrize("answer", ANSWERS, ids=range(len(ANSWERS)))
def test_whatever_a_server_answers_the_error_is_one_plain_line(server, tmp_path, answer):
    server.raw = answer
    for begun in (b"", BODY[:1000]):
        (tmp_path / "x.pt.part").write_bytes(begun)
        with pytest.raises(OSError) as error:
            get(server, tmp_path / "x.pt")
        said = str(error.value)
        assert said.isprintable() and said.startswith(server.url) and len(said) < 600
        assert "run again" in said and not (tmp_path / "x.pt").exists()
    server.raw = None  # and nothing that it left is in the way
    for _ in range(2):
        try:
            get(server, tmp_path / "x.pt")
            break
        except OSError:
            pass
    assert (tmp_path / "x.pt").read_bytes() == BODY


def test_several_processes_fetch_it_once(server, tmp_path):
    """All ranks of a run fetch the checkpoint they start from; two writers would ruin the partial file."""
    server.pause = 0.3
    children = []
    for _ in range(4):
        if (pid := os.fork()) == 0:
            try:
                get(server, tmp_path / "x.pt")
                os._exit(0 if (tmp_path / "x.pt").read_bytes() == BODY else 3)
            except BaseException:
                os._exit(1)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0] * 4
    assert len(server.asked) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


def test_a_full_disk_is_named(server, tmp_path):
    """The kernel refuses to let the file grow. The partial file is kept and continued later."""

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        with pytest.raises(OSError, match="x.pt.part: .*File too large; run again"):
            get(server, tmp_path / "x.pt")

    if (pid := os.fork()) == 0:
        try:
            limited()
            os._exit(0)
        except BaseException:
            os._exit(1)
    assert os.waitpid(pid, 0)[1] == 0
    assert (tmp_path / "x.pt.part").stat().st_size == 300_000
    get(server, tmp_path / "x.pt")
    assert (tmp_path / "x.pt").read_bytes() == BODY and server.asked[-1][1] == "bytes=300000-"


def test_a_cache_that_cannot_be_written_is_one_line(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "LLIP", server.url)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        download.fetch("llip-B-16", tmp_path / "file" / "cache")


def test_redirects_in_a_circle_end(server, tmp_path):
    server.redirect = server.url + "/y"
    with pytest.raises(OSError):
        get(server, tmp_path / "x.pt")


def test_redirects_go_to_https_only(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SCHEMES", ("https",))
    server.redirect = server.url + "/y"
    with pytest.raises(OSError, match="only https"):
        get(server, tmp_path / "x.pt")
    assert len(server.asked) == 1


def test_no_server(tmp_path):
    with pytest.raises(OSError, match="give the path of a file"):
        download.download("http://127.0.0.1:1/x", tmp_path / "x.pt", SHA256)


def test_fetch_by_name(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(download, "OPENAI", server.url)
    monkeypatch.setattr(download, "LLIP", server.url)
    monkeypatch.setitem(download.NAMES, "ViT-L-14-336", (SHA256, "ViT-L-14-336px.pt"))
    path = download.fetch("ViT-L/14@336px", tmp_path / "cache")
    assert path.read_bytes() == BODY
    assert server.asked[-1][0] == f"/{SHA256}/ViT-L-14-336px.pt"
    count = len(server.asked)
    assert download.fetch("ViT-L-14-336", tmp_path / "cache") == path
    assert len(server.asked) == count, "the cache is used"
    path.write_bytes(BODY[:-1])
    with pytest.raises(ValueError, match="delete it"):
        download.fetch("ViT-L-14-336", tmp_path / "cache")
    assert "MB of" in capsys.readouterr().err
    download.fetch("llip-B-16", tmp_path / "cache")
    assert "no hash was published" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not one of"):
        download.fetch("ViT-B-33", tmp_path)


def test_every_release_has_its_hash():
    for name, (sha256, file) in download.NAMES.items():
        assert file.endswith(".pt") and "/" not in name
        assert name.startswith("llip") if sha256 is None else len(bytes.fromhex(sha256)) == 32
