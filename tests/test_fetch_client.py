"""The downloads: what comes of each kind of answer, what is refused, the limits, and that nothing is left behind."""

import http.client
import io
import itertools
import os
import pickle
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import replace

import certifi
import pycurl
import pytest
from PIL import Image

from align_train.corpus.fetch.addresses import is_permitted
from align_train.corpus.fetch.client import Client, Download, Limits, Permissions
from align_train.corpus.fetch.hosts import HostQueue
from align_train.corpus.fetch.loop import LOOK_AHEAD
from align_train.corpus.fetch.responses import backoff, opt_out
from align_train.corpus.fetch.transfers import Transfer
from align_train.corpus.fetch.urls import Request
from align_train.corpus.sample_corpus import read_sample

pytest_plugins = ["bad_server"]

QUICK = Limits(connect_seconds=5, total_seconds=5, max_bytes=100_000, retries=2, backoff_seconds=0.01)
LOCAL = Permissions(networks=("127.0.0.1/32",))


def download(url, limits=QUICK, permissions=LOCAL):
    [(key, result)] = Client(limits, permissions).downloads([("key", url)])
    assert key == "key"
    assert bool(result.content) == (not result.reason)
    return result


def as_served(server, path):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
    connection.request("GET", path, headers={"Connection": "close"})
    content = connection.getresponse().read()
    connection.close()
    return content


def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("align_train")]


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No test leaves a thread of the client or a file open."""
    files = len(os.listdir("/dev/fd"))
    yield
    assert not own_threads()
    assert len(os.listdir("/dev/fd")) <= files  # fewer, where rubbish of an earlier test went


# What comes of an answer


@pytest.mark.parametrize(
    "path",
    [
        "/ok/1.jpg",
        "/photo/640x480/3.jpg",
        "/bomb.png",
        "/animated.gif",
        "/cmyk.jpg",
        "/16bit.png",
        "/image.webp",
        "/html.jpg",
        "/ok/1.jpg?a=é b#fragment",
    ],
)
def test_what_is_served_arrives_byte_for_byte(bad_server, path):
    result = download(bad_server.url + path)
    assert result == Download(result.content)
    assert result.content == as_served(bad_server, path.partition("?")[0])


def test_the_images_of_the_bad_server_are_what_they_claim(bad_server):
    def image(path):
        return Image.open(io.BytesIO(as_served(bad_server, path)))

    with pytest.warns(Image.DecompressionBombWarning, match="100000000 pixels"):
        assert image("/bomb.png").size == (10_000, 10_000)
    assert image("/animated.gif").n_frames == 3
    assert image("/cmyk.jpg").mode == "CMYK"
    assert image("/16bit.png").mode.startswith("I;16")
    assert image("/image.webp").format == "WEBP"
    assert image("/rotated.jpg").getexif()[0x0112] == 6
    assert image("/transparent.png").mode == "RGBA"
    assert image("/photo/64x48/1.jpg").size == (64, 48)


@pytest.mark.parametrize(
    ("path", "reason", "attempts"),
    [
        ("/404", "http_404", 1),
        ("/status/403", "http_403", 1),
        ("/status/304", "http_304", 1),
        ("/500", "http_500", 3),
        ("/503-then-ok?times=1", "", 2),
        ("/503-then-ok?times=9", "http_503", 3),
        ("/429-then-ok?times=2", "", 3),
        ("/truncated", "truncated", 3),
        ("/truncated-chunks", "truncated", 3),
        ("/reset", "connection", 3),
        ("/garbage-length", "bad_response", 1),
        ("/not-http", "bad_response", 1),
        ("/big", "too_large", 1),
        ("/huge", "too_large", 1),
        ("/empty", "empty", 1),
        ("/no-content", "empty", 1),
        ("/loop", "too_many_redirects", 1),
        ("/noai.jpg", "opt_out", 1),
        ("/to-private", "refused_address", 1),
        ("/to-loopback", "refused_address", 1),
        ("/to-file", "scheme", 1),
        ("/to-odd-host", "bad_url", 1),
        ("/redirect?to=gopher://127.0.0.1/", "scheme", 1),
        ("/redirect?to=http://[::1]/", "refused_address", 1),
    ],
)
def test_each_answer_has_its_reason_and_number_of_attempts(bad_server, path, reason, attempts):
    result = download(bad_server.url + path)
    assert (result.reason, result.attempts) == (reason, attempts)
    assert bool(result.detail) == bool(reason)
    requests = attempts * (1 + QUICK.redirects) if path == "/loop" else attempts
    assert bad_server.hits == {path.partition("?")[0]: requests}


@pytest.mark.parametrize("path", ["/never", "/slow-drip"])
def test_an_attempt_ends_after_its_time(bad_server, path):
    result = download(bad_server.url + path, replace(QUICK, total_seconds=0.2, retries=1))
    assert (result.reason, result.attempts) == ("timeout", 2)


def test_a_wrong_length_gives_what_was_announced(bad_server):
    assert download(f"{bad_server.url}/wrong-length").content == as_served(bad_server, "/ok/1.jpg")[:-10]


def test_a_file_of_just_the_cap_is_fetched(bad_server):
    size = len(as_served(bad_server, "/ok/1.jpg"))
    assert not download(f"{bad_server.url}/ok/1.jpg", replace(QUICK, max_bytes=size)).reason
    assert download(f"{bad_server.url}/ok/1.jpg", replace(QUICK, max_bytes=size - 1)).reason == "too_large"


def test_the_size_is_counted_even_where_libcurl_does_not(bad_server):
    held = []
    transfer = Transfer(QUICK, LOCAL, held.append)
    transfer.handle.setopt(pycurl.MAXFILESIZE_LARGE, 0)
    transfer.begin(Request("key", f"{bad_server.url}/big"), ["127.0.0.1"])
    with pytest.raises(pycurl.error) as error:
        transfer.handle.perform()
    answer = transfer.finished(*error.value.args)
    transfer.close()
    assert (answer.download.reason, answer.retry_after) == ("too_large", None)
    assert sum(held) == 0  # all that was counted was released


@pytest.mark.parametrize(("hops", "reason"), [(3, ""), (4, "too_many_redirects")])
def test_redirects_are_followed_up_to_their_number(bad_server, hops, reason):
    assert download(f"{bad_server.url}/hops/{hops}", replace(QUICK, redirects=3)).reason == reason


def test_a_retry_after_is_waited_for_but_not_beyond_the_time_of_an_attempt(bad_server):
    start = time.monotonic()
    result = download(f"{bad_server.url}/429-then-ok?after=3600", replace(QUICK, total_seconds=0.8))
    assert (result.reason, result.attempts) == ("", 2)
    assert time.monotonic() - start >= 0.8


def test_the_wait_before_a_retry_depends_on_url_and_attempt_only():
    waits = [backoff(f"http://a/{n}", 1, 0.5) for n in range(50)]
    assert waits == [backoff(f"http://a/{n}", 1, 0.5) for n in range(50)]
    assert len(set(waits)) == 50
    assert all(0.25 <= wait < 0.75 for wait in waits)
    assert all(1 <= backoff(f"http://a/{n}", 3, 0.5) < 3 for n in range(50))


def test_the_same_url_twice_is_fetched_twice(bad_server):
    urls = [(number, f"{bad_server.url}/ok/1.jpg") for number in range(10)]
    results = dict(Client(QUICK, LOCAL).downloads(urls))
    assert sorted(results) == list(range(10))
    assert len({result.content for result in results.values()}) == 1
    assert bad_server.hits["/ok/1.jpg"] == 10


def test_the_request_names_the_program_and_asks_for_no_compression(bad_server):
    download(f"{bad_server.url}/ok/1.jpg")
    assert bad_server.headers["User-Agent"].startswith("align_train/")
    assert "Accept-Encoding" not in bad_server.headers


# What is refused


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "0177.0.0.1", "127.1", "[::ffff:127.0.0.1]", "0.0.0.0"]
)
def test_this_machine_is_refused_however_it_is_spelt(bad_server, host):
    result = download(f"http://{host}:{bad_server.server_port}/ok/1.jpg", permissions=Permissions())
    assert (result.reason, result.attempts, bad_server.connections) == ("refused_address", 1, 0)


@pytest.mark.parametrize("host", ["[::1]", "10.0.0.1", "169.254.169.254", "[fd00:ec2::254]", "[64:ff9b::a00:1]"])
def test_private_addresses_are_refused_without_a_connection(host):
    assert download(f"http://{host}/").reason == "refused_address"


def test_a_public_name_with_a_private_address_is_refused(bad_server, monkeypatch):
    answer = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    url = f"http://images.example:{bad_server.server_port}/ok/1.jpg"
    assert download(url, permissions=Permissions()).reason == "refused_address"
    assert not bad_server.connections
    assert download(url).content


def test_of_several_addresses_those_that_are_permitted_are_used(bad_server, monkeypatch):
    answer = [(0, 0, 0, "", (address, 0)) for address in ("::1", "10.0.0.1", "127.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: answer)
    assert download(f"http://images.example:{bad_server.server_port}/ok/1.jpg").content


def test_the_check_does_not_rest_on_the_look_up(bad_server):
    transfer = Transfer(QUICK, Permissions(), lambda _: None)
    transfer.begin(Request("key", f"http://localhost:{bad_server.server_port}/ok/1.jpg"), ["93.184.215.14"])
    transfer.handle.setopt(pycurl.RESOLVE, [f"localhost:{bad_server.server_port}:127.0.0.1"])
    with pytest.raises(pycurl.error) as error:
        transfer.handle.perform()
    assert transfer.finished(*error.value.args).download.reason == "refused_address"
    transfer.close()
    assert not bad_server.connections


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.0.1", "169.254.169.254"),
        *("172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1"),
        *("198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.250", "240.0.0.1", "255.255.255.255"),
        *("168.63.129.16", "::", "::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "100::1"),
        *("2001:db8::1", "3fff::1", "5f00::1", "64:ff9b:1::1"),
        *("::ffff:10.0.0.1", "::ffff:127.0.0.1", "::ffff:169.254.169.254"),  # IPv4-mapped
        *("::127.0.0.1", "::8.8.8.8"),  # IPv4-compatible
        *("64:ff9b::10.0.0.1", "64:ff9b::127.0.0.1"),  # NAT64
        *("2002:a00:1::", "2002:7f00:1::1", "2002:808:808::1"),  # 6to4
        *("2001:0:4136:e378:8000:63bf:3fff:fdd2", "2001:0:808:808::1"),  # Teredo
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_permitted(address)


@pytest.mark.parametrize(
    "address",
    [
        *("1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1", "223.1.1.1"),
        *("2606:4700::1111", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8"),
    ],
)
def test_public_addresses(address):
    assert is_permitted(address)


def test_private_networks_can_be_permitted_one_by_one():
    networks = ("127.0.0.0/8", "fd00::/8")
    assert is_permitted("127.0.0.2", networks)
    assert is_permitted("::ffff:127.0.0.2", networks)
    assert is_permitted("fd00::1", networks)
    assert is_permitted("8.8.8.8", networks)
    assert not is_permitted("10.0.0.1", networks)
    assert not is_permitted("::1", networks)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("ftp://127.0.0.1/a.jpg", "scheme"),
        ("file:///etc/hosts", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("images/a.jpg", "bad_url"),
        ("", "bad_url"),
        ("http://", "bad_url"),
        ("http://[1/", "bad_url"),
        ("http://a:b/", "bad_url"),
        ("http://a:99999/", "bad_url"),
        ("http://a b/", "bad_url"),
        ("http://a,b/", "bad_url"),
        ("http://a\ud800/", "bad_url"),
        ("http://a/\ud800", "bad_url"),
    ],
)
def test_what_is_no_url_to_fetch_is_not_attempted(url, reason):
    result = download(url)
    assert (result.reason, result.attempts) == (reason, 0)


def test_a_proxy_of_the_environment_is_not_used(bad_server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert download(f"{bad_server.url}/ok/1.jpg").content


def test_files_are_read_where_that_is_permitted(tmp_path):
    (tmp_path / "a é.jpg").write_bytes(b"content")
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    permissions = Permissions(files=True)
    url = (tmp_path / "a é.jpg").as_uri()
    assert download(url, permissions=permissions) == Download(b"content")
    assert download(url).reason == "scheme"
    assert download(url, replace(QUICK, max_bytes=6), permissions).reason == "too_large"
    assert download(url, replace(QUICK, max_bytes=7), permissions).content
    assert download(f"{tmp_path.as_uri()}/empty", permissions=permissions).reason == "empty"
    for name in ("missing", "pipe", ""):
        assert download(f"{tmp_path.as_uri()}/{name}", permissions=permissions).reason == "missing_file"
    for bad in ("file://elsewhere/etc/hosts", "file:///a%00b"):
        assert download(bad, permissions=permissions).reason == "bad_url"


def test_links_into_the_package_need_no_network(bad_server):
    shipped = next(read_sample())
    assert download(f" package:{shipped.key}", permissions=Permissions()) == Download(shipped.image)
    unknown = download("package:../secret", permissions=Permissions())
    assert (unknown.reason, unknown.detail) == ("missing_file", "the package ships no package:../secret")
    assert download(f"{bad_server.url}/redirect?to=package:{shipped.key}").reason == "scheme"


# Opt-outs


@pytest.mark.parametrize(
    ("header", "is_out"),
    [
        ("X-Robots-Tag: noai", True),
        ("x-robots-tag: NoImageAI , nofollow", True),
        ("X-Robots-Tag: nofollow,noindex", True),
        ("X-Robots-Tag: noimageindex", True),
        ("X-Robots-Tag: none", True),
        ("X-Robots-Tag: noml", True),
        ("X-Robots-Tag: align_train: noai", True),
        ("X-Robots-Tag: Align_Train:nofollow, noai", True),
        ("X-Robots-Tag: *: noai", True),
        ("X-Robots-Tag: googlebot: nofollow, align_train: noai", True),
        ("X-Robots-Tag: noai, googlebot: nofollow", True),
        ("X-Robots-Tag: max-snippet: 20, noai", True),
        ("X-Robots-Tag: unavailable_after: 25 Jun 2010 15:00:00 PST, noai", True),
        ("X-Robots-Tag: unavailable_after: Friday, 25 Jun 2010 15:00:00 PST, noai", True),
        ("TDM-Reservation: 1", True),
        ("X-Robots-Tag: googlebot: noai", False),
        ("X-Robots-Tag: googlebot: nofollow, noindex", False),
        ("X-Robots-Tag: all", False),
        ("X-Robots-Tag: nofollow, noarchive, max-image-preview:none", False),
        ("X-Robots-Tag: noairlines", False),
        ("X-Robots-Tag:", False),
        ("TDM-Reservation: 0", False),
        ("TDM-Policy: 1", False),
        ("Content-Type: noai", False),
    ],
)
def test_headers_that_opt_out(header, is_out):
    lines = [b"HTTP/1.1 200 OK\r\n", f"{header}\r\n".encode(), b"\r\n"]
    assert bool(opt_out(lines, Permissions().agents)) == is_out


def test_an_opt_out_for_the_name_in_the_user_agent_counts(bad_server):
    url = f"{bad_server.url}/with?X-Robots-Tag=mybot:%20noai"
    assert not download(url).reason
    assert download(url, permissions=replace(LOCAL, user_agent="MyBot/1.0 (a test)")).reason == "opt_out"


def test_opt_outs_can_be_ignored(bad_server):
    for path in ("/noai.jpg", "/with?tdm-reservation=1"):
        assert download(bad_server.url + path).reason == "opt_out"
        assert download(bad_server.url + path, permissions=replace(LOCAL, ignore_opt_out=True)).content


# Names and certificates


@pytest.mark.parametrize(("code", "attempts"), [(socket.EAI_NONAME, 1), (socket.EAI_AGAIN, 3)])
def test_a_name_is_looked_up_again_only_where_that_may_help(monkeypatch, code, attempts):
    asked = []

    def look_up(name, *_, **__):
        asked.append(name)
        raise socket.gaierror(code, "no")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    result = download("http://images.example/1.jpg")
    assert (result.reason, result.attempts, len(asked)) == ("dns", attempts, attempts)


def test_a_dead_name_server_holds_up_nobody(bad_server, monkeypatch):
    answered, looked_up = threading.Event(), socket.getaddrinfo

    def look_up(name, *rest, **options):
        if name.endswith(".example"):
            answered.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "too late")
        return looked_up(name, *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    dead = [(f"dead {n}", f"http://{n}.example/") for n in range(30)]
    alive = [(f"alive {n}", f"{bad_server.url}/ok/{n}.jpg") for n in range(10)]
    limits = replace(QUICK, connect_seconds=0.5, retries=1)
    results = list(Client(limits, LOCAL).downloads(dead + alive))
    answered.set()
    for thread in threading.enumerate():
        if thread.name == "align_train look-ups":
            thread.join()
    assert {key for key, _ in results[:10]} == {key for key, _ in alive}
    assert all(result.content for _, result in results[:10])
    assert {(result.reason, result.attempts) for _, result in results[10:]} == {("connect_timeout", 2)}


@pytest.fixture
def certificate(tmp_path):
    if shutil.which("openssl") is None:
        pytest.skip("needs the program openssl for a certificate")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-days", "2", "-subj", "/CN=a test", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-keyout", "key.pem", "-out", "certificate.pem"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    return tmp_path / "certificate.pem"


def test_certificates_are_verified(bad_server, certificate, monkeypatch):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_name("key.pem"))
    bad_server.wrap = lambda plain: context.wrap_socket(plain, server_side=True)
    url = f"https://127.0.0.1:{bad_server.server_port}/ok/1.jpg"
    assert (download(url).reason, download(url).attempts) == ("tls", 1)
    monkeypatch.setattr(certifi, "where", lambda: str(certificate))
    assert download(url).content
    named = replace(LOCAL, networks=("127.0.0.0/8", "::1/128"))
    assert download(url.replace("127.0.0.1", "localhost"), permissions=named).reason == "tls"


def test_a_handshake_that_never_ends_is_a_connect_timeout():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/"
        result = download(url, replace(QUICK, connect_seconds=0.15, retries=1))
    assert (result.reason, result.attempts) == ("connect_timeout", 2)


def test_nobody_listening_is_a_failed_connection():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    result = download(url)
    assert (result.reason, result.attempts) == ("connection", 3)


# Limits


def test_waiting_for_a_place_at_a_host_does_not_count_as_time(bad_server):
    limits = replace(QUICK, per_host=2, total_seconds=0.6, retries=0)
    start = time.monotonic()
    urls = [(n, f"{bad_server.url}/late/40/{n}.jpg") for n in range(40)]
    results = list(Client(limits, LOCAL).downloads(urls))
    assert time.monotonic() - start > limits.total_seconds
    assert [result.reason for _, result in results] == [""] * 40
    assert bad_server.most_at_once == 2


def test_a_busy_host_does_not_block_the_others(bad_server):
    busy = [(-n, f"http://localhost:{bad_server.server_port}/never") for n in range(1, 21)]
    free = [(n, f"{bad_server.url}/ok/{n}.jpg") for n in range(1, 11)]
    limits = replace(QUICK, per_host=2, connections=8)
    downloads = Client(limits, LOCAL).downloads(busy + free)
    assert sorted(key for key, _ in itertools.islice(downloads, 10)) == list(range(1, 11))
    downloads.close()
    assert bad_server.hits["/never"] == 2


def test_redirects_keep_to_the_limit_of_the_host_they_lead_to(bad_server):
    there = f"http://localhost:{bad_server.server_port}/late/10/1.jpg"
    urls = [(n, f"{bad_server.url}/redirect?to={there}") for n in range(20)]
    results = list(Client(replace(QUICK, per_host=1), LOCAL).downloads(urls))
    assert all(result.content for _, result in results)
    assert bad_server.most_at_once <= 2  # one at each of the two hosts


def test_connections_are_used_again(bad_server):
    urls = [(n, f"{bad_server.url}/ok/{n % 5}.jpg") for n in range(50)]
    assert all(result.content for _, result in Client(replace(QUICK, connections=3), LOCAL).downloads(urls))
    assert bad_server.connections <= 3
    assert bad_server.most_at_once <= 3


def test_a_page_with_an_error_leaves_the_connection_open(bad_server):
    assert len(list(Client(replace(QUICK, connections=1), LOCAL).downloads([(1, f"{bad_server.url}/404")] * 5))) == 5
    assert bad_server.connections == 1


def test_a_consumer_that_takes_nothing_stops_the_downloads(bad_server):
    size = len(as_served(bad_server, "/photo/320x240/1.jpg"))
    limits = replace(QUICK, ahead_bytes=20 * size, connections=4)
    urls = ((n, f"{bad_server.url}/photo/320x240/1.jpg") for n in itertools.count())
    downloads = Client(limits, LOCAL).downloads(urls)
    for taken in range(1, 60):
        next(downloads)
        assert bad_server.hits.total() - taken <= 20 + 4 + 1
    bad_server.pause()
    assert 1 <= bad_server.hits.total() - taken <= 20 + 4 + 1
    downloads.close()


def test_failures_are_held_back_too(bad_server):
    drawn = itertools.count()
    downloads = Client(replace(QUICK, ahead_bytes=50_000), LOCAL).downloads((n, "nonsense") for n in drawn)
    next(downloads)
    bad_server.pause()
    downloads.close()
    assert next(drawn) < 1000


def test_urls_are_drawn_a_bounded_number_ahead(bad_server):
    drawn = itertools.count()
    urls = ((n, f"{bad_server.url}/{'never' if n else 'ok/1.jpg'}") for n in drawn)
    downloads = Client(replace(QUICK, per_host=2, connections=4), LOCAL).downloads(urls)
    assert next(downloads)[0] == 0
    bad_server.pause()
    downloads.close()
    assert next(drawn) <= 4 * LOOK_AHEAD + 2


@pytest.mark.parametrize("window", [1, 10])
def test_the_oldest_unfinished_url_bounds_how_many_are_drawn_beyond_it(bad_server, window):
    urls = ((n, f"{bad_server.url}/ok/1.jpg" if n else f"{bad_server.url}/never") for n in range(40))
    downloads = Client(replace(QUICK, total_seconds=0.4, retries=0, window=window), LOCAL).downloads(urls)
    early = [key for key, _ in itertools.takewhile(lambda result: result[0] != 0, downloads)]
    assert set(early) <= set(range(window))
    assert sorted([*early, 0, *(key for key, _ in downloads)]) == list(range(40))
    assert bad_server.hits.total() == 40


def test_all_arrive_through_the_smallest_look_ahead(bad_server):
    urls = [(n, f"{bad_server.url}/ok/{n}.jpg") for n in range(30)]
    results = dict(Client(replace(QUICK, ahead_bytes=1), LOCAL).downloads(urls))
    assert sorted(results) == list(range(30))
    assert all(result.content for result in results.values())


def test_a_host_queue_keeps_the_order_and_the_limit():
    queue = HostQueue(2)
    requests = [Request(n, f"http://{'a' if n < 4 else 'b'}/") for n in range(6)]
    for request in requests:
        queue.put(request)
    assert [queue.take().key for _ in range(4)] == [0, 1, 4, 5]
    assert queue.take() is None
    queue.release("b")
    assert queue.take() is None
    queue.release("a")
    assert queue.take().key == 2


@pytest.mark.parametrize("name", ["connections", "max_bytes", "total_seconds", "ahead_bytes", "per_host"])
def test_a_limit_of_nothing_is_an_error(name):
    with pytest.raises(ValueError, match=f"{name} of the downloads is 0"):
        Limits(**{name: 0})


def test_permissions_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match=r"'127\.0\.0\.1/8' is not a network"):
        Permissions(networks=("127.0.0.1/8",))
    with pytest.raises(ValueError, match="one line of ASCII"):
        Permissions(user_agent="a\r\nX-Header: b")


# The end


def endless(server):
    return ((n, f"{server.url}/ok/{n % 7}.jpg") for n in itertools.count())


def test_a_client_can_be_pickled_and_used_for_more_than_one_round(bad_server):
    client = pickle.loads(pickle.dumps(Client(QUICK, LOCAL)))  # noqa: S301 - the test's own bytes
    for _ in range(2):
        assert len(list(client.downloads([(n, f"{bad_server.url}/ok/1.jpg") for n in range(3)]))) == 3
    assert list(client.downloads([])) == []


def test_closing_early_ends_the_thread_and_the_connections_at_once(bad_server):
    downloads = Client(replace(QUICK, connections=8), LOCAL).downloads(
        (n, f"{bad_server.url}/{'never' if n % 2 else 'ok/1.jpg'}") for n in itertools.count()
    )
    assert next(downloads)[1].content
    assert own_threads()
    start = time.monotonic()
    downloads.close()
    assert time.monotonic() - start < 1  # the transfers under way had 5 seconds
    assert not own_threads()


def test_dropping_the_iterator_ends_the_thread(bad_server):
    downloads = Client(QUICK, LOCAL).downloads(endless(bad_server))
    next(downloads)
    del downloads
    assert not own_threads()


def test_an_error_of_the_consumer_ends_the_thread(bad_server):
    def consume():
        for _ in Client(QUICK, LOCAL).downloads(endless(bad_server)):
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        consume()
    assert not own_threads()


def test_an_error_of_the_urls_is_raised_in_the_consumer(bad_server):
    def urls():
        yield 1, f"{bad_server.url}/never"
        yield 2, "nonsense"
        raise OSError("the parquet is truncated")

    downloads = Client(QUICK, LOCAL).downloads(urls())
    with pytest.raises(OSError, match="the parquet is truncated"):
        list(downloads)


def test_an_iterator_never_begun_costs_nothing(bad_server):
    Client(QUICK, LOCAL).downloads(endless(bad_server))
    assert not own_threads()
