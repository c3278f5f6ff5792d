"""A web server that misbehaves, at 127.0.0.1: the fixture `bad_server`, by `pytest_plugins = ["bad_server"]`.

/ok/7.jpg                        a small JPEG, another one for each number; /photo/640x480/7.jpg of any size
/late/50/7.jpg                   /ok/7.jpg after 50 milliseconds
/status/404  /404  /500          the status, with a page that says so
/429-then-ok?times=1&after=0     429 with that Retry-After so many times, then a JPEG; /503-then-ok likewise
/never  /slow-drip               no answer; a byte now and then, without end
/truncated  /truncated-chunks    closed in the middle of the body
/wrong-length  /garbage-length   Content-Length 10 less than the body; not a number
/big  /huge                      an endless body, unannounced; one of 10 GB, announced
/reset  /not-http                closed without an answer; an answer that is no HTTP
/empty  /no-content  /html.jpg   200 without a byte; 204; a web page that calls itself a JPEG
/noai.jpg                        X-Robots-Tag: noai; /with?name=value&... has any headers
/bomb.png                        100 megapixels in some kilobytes
/animated.gif  /cmyk.jpg  /16bit.png  /image.webp  /rotated.jpg  /transparent.png
/loop  /hops/3                   redirects: without end; that often, then a JPEG
/redirect?to=URL  /to-private  /to-loopback  /to-file  /to-odd-host
"""

import io
import socket
import struct
import threading
import zlib
from collections import Counter
from contextlib import closing, suppress
from functools import cache
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from urllib.parse import parse_qsl, urlsplit

import numpy as np
import pytest
from PIL import Image


@cache
def photo(width, height, number):
    """A JPEG of soft colours that depend on the number."""
    few = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return encoded(Image.fromarray(few).resize((width, height), Image.Resampling.BICUBIC), "JPEG")


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


@cache
def bomb(side=10_000):
    """A PNG of side x side black pixels, one bit each."""
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compressobj()
    content = b"".join(rows.compress(bytes(1 + (side + 7) // 8)) for _ in range(side)) + rows.flush()
    chunks = [(b"IHDR", header), (b"IDAT", content), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


@cache
def odd_image(name):
    """The image of that name, all 60 x 40 before any rotation."""
    ramp = np.arange(40 * 60, dtype=np.uint16).reshape(40, 60)
    colours = Image.fromarray(np.stack([ramp % 256, ramp // 10, ramp * 7 % 256], 2).astype(np.uint8))
    match name:
        case "animated.gif":
            frames = [colours.rotate(angle) for angle in (0, 90, 180)]
            return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
        case "cmyk.jpg":
            return encoded(colours.convert("CMYK"), "JPEG")
        case "16bit.png":
            return encoded(Image.fromarray(ramp * 27), "PNG")
        case "image.webp":
            return encoded(colours, "WEBP")
        case "rotated.jpg":
            exif = Image.Exif()
            exif[0x0112] = 6  # shown upright after a quarter turn
            return encoded(colours, "JPEG", exif=exif)
        case "transparent.png":
            colours.putalpha(Image.linear_gradient("L").resize((60, 40)))
            return encoded(colours, "PNG")


TYPES = {"jpg": "image/jpeg", "png": "image/png", "gif": "image/gif", "webp": "image/webp"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or a body in two pieces takes 40 ms

    def do_GET(self):
        parts = urlsplit(self.path)
        _, first, *rest = parts.path.split("/")
        self.query = dict(parse_qsl(parts.query))
        self.server.headers = dict(self.headers)
        with self.server.counted(parts.path):
            name = first.partition(".")[0].replace("-", "_")
            if first.isdigit():
                self.answer_status(first)
            elif first.endswith("-then-ok"):
                self.answer_then_ok(int(first[:3]), **self.query)
            elif first in ("animated.gif", "cmyk.jpg", "16bit.png", "image.webp", "rotated.jpg", "transparent.png"):
                self.send(odd_image(first), TYPES[first.rpartition(".")[2]])
            elif answer := getattr(self, f"answer_{name}", None):
                answer(*rest)
            else:
                self.answer_status(404)

    def send(self, content=b"", type="image/jpeg", status=200, **headers):
        self.send_response(status)
        for name, value in {"Content-Type": type, "Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def begin(self, **headers):
        """A head whose body is up to the caller, and the connection's end with it."""
        self.close_connection = True
        self.send_response(200)
        for name, value in {"Content-Type": "image/jpeg", "Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def answer_ok(self, name):
        self.send(photo(32, 24, int(name.partition(".")[0])))

    def answer_photo(self, size, name):
        width, height = map(int, size.split("x"))
        self.send(photo(width, height, int(name.partition(".")[0])))

    def answer_late(self, milliseconds, name):
        self.server.stopping.wait(int(milliseconds) / 1000)
        self.answer_ok(name)

    def answer_status(self, status):
        self.send(b"<html>no</html>" * 100, "text/html", int(status))

    def answer_then_ok(self, status, times="1", after="0"):
        if self.server.hits[urlsplit(self.path).path] <= int(times):
            self.send(b"later", "text/plain", status, Retry_After=after)
        else:
            self.answer_ok("1.jpg")

    def answer_never(self):
        self.close_connection = True
        self.server.stopping.wait()

    def answer_slow_drip(self):
        self.begin()
        while not self.server.stopping.wait(0.02):
            self.wfile.write(b"\xff")

    def answer_truncated(self):
        content = photo(32, 24, 1)
        self.begin(Content_Length=len(content))
        self.wfile.write(content[: len(content) // 2])

    def answer_truncated_chunks(self):
        self.begin(Transfer_Encoding="chunked")
        self.wfile.write(b"5\r\nhello\r\n50\r\nonly the beginning")

    def answer_wrong_length(self):
        content = photo(32, 24, 1)
        self.begin(Content_Length=len(content) - 10)
        self.wfile.write(content)

    def answer_garbage_length(self):
        self.begin(Content_Length="many")
        self.wfile.write(photo(32, 24, 1))

    def answer_big(self):
        self.begin()
        while not self.server.stopping.is_set():
            self.wfile.write(b"\xff\xd8\xff" + bytes(20_000))

    def answer_huge(self):
        self.begin(Content_Length=10_000_000_000)
        self.wfile.write(b"\xff\xd8\xff")
        self.server.stopping.wait()

    def answer_reset(self):
        self.close_connection = True

    def answer_not_http(self):
        self.close_connection = True
        self.wfile.write(b"220 mail.example ESMTP\r\n")

    def answer_empty(self):
        self.send()

    def answer_no_content(self):
        self.close_connection = True
        self.send_response(204)
        self.end_headers()

    def answer_html(self):
        self.send(b"<!doctype html><html><body>Please log in</body></html>")

    def answer_noai(self):
        self.send(photo(32, 24, 1), X_Robots_Tag="noai")

    def answer_with(self):
        self.send(photo(32, 24, 1), **self.query)

    def answer_bomb(self):
        self.send(bomb(), "image/png")

    def answer_loop(self):
        self.send(status=302, Location="/loop")

    def answer_hops(self, left):
        self.send(status=302, Location=f"/hops/{int(left) - 1}" if int(left) > 1 else "/ok/1.jpg")

    def answer_redirect(self):
        self.send(status=302, Location=self.query["to"])

    def answer_to_private(self):
        self.send(status=302, Location="http://10.0.0.1/ok/1.jpg")

    def answer_to_loopback(self):
        self.send(status=302, Location=f"http://127.0.0.2:{self.server.server_port}/ok/1.jpg")

    def answer_to_file(self):
        self.send(status=302, Location="file:///etc/hosts")

    def answer_to_odd_host(self):
        self.send(status=302, Location="http://n\xf6.invalid/")  # sent as Latin-1, which is not UTF-8

    def log_message(self, *_):
        pass


class BadServer(ThreadingHTTPServer):
    """The server.

    Attributes:
        url: `http://127.0.0.1:` and the port.
        hits: requests by path, without the query.
        at_once, most_at_once: requests being answered, now and at most.
        connections: sockets ever accepted.
        headers: of the last request.
        wrap: applied to each socket, for TLS.
        stopping: set at the end; whatever waits here waits for it.
    """

    daemon_threads = False  # so that server_close waits for them
    request_queue_size = 256

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.hits, self.at_once, self.most_at_once, self.connections = Counter(), 0, 0, 0
        self.headers, self.wrap = {}, lambda plain: plain
        self.stopping, self._lock, self._sockets = threading.Event(), threading.Condition(), set()

    def server_bind(self):
        TCPServer.server_bind(self)  # HTTPServer's would look up the name of this machine
        self.server_name, self.server_port = self.server_address

    def counted(self, path):
        with self._lock:
            self.hits[path] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            self._lock.notify_all()
        return self

    def wait_for(self, paths):
        """Until each of the paths has been asked for."""
        with self._lock:
            assert self._lock.wait_for(lambda: paths <= self.hits.keys(), timeout=60), paths - self.hits.keys()

    def pause(self):
        """Answers a hundred other requests, which are not counted: time for many more, were they not held back."""
        for _ in range(100):
            with closing(HTTPConnection("127.0.0.1", self.server_port)) as connection:
                connection.request("GET", "/ok/100.jpg")
                connection.getresponse().read()
        with self._lock:
            del self.hits["/ok/100.jpg"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with self._lock:
            self.at_once -= 1

    def get_request(self):
        plain, address = super().get_request()
        return self.wrap(plain), address

    def process_request(self, request, client_address):
        with self._lock:
            self.connections += 1
            self._sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        with self._lock:
            self._sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, *_):
        pass  # clients that hang up are what this server is for

    def stop(self):
        self.stopping.set()
        self.shutdown()
        with self._lock:
            for request in self._sockets:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)
        self.server_close()


@pytest.fixture
def bad_server():
    server = BadServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.stop()
    thread.join()
