import ipaddress

import pytest
from pydantic import ValidationError

from engine.errors import MediaForbidden
from engine.media.guard import FetchPolicy, check_url, is_allowed

WHERE = "messages[0].content[1].image_url.url"


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "168.63.129.16", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1",
        "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1",
        "239.1.1.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254",
        "64:ff9b::7f00:1", "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1",
        "2002:7f00:1::", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%1", "fec0::1", "ff02::1",
    ],
)  # fmt: skip
def test_addresses_that_lead_inside_are_refused(address):
    assert not is_allowed(ipaddress.ip_address(address), FetchPolicy())


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_public_addresses_are_allowed(address):
    assert is_allowed(ipaddress.ip_address(address), FetchPolicy())


def test_a_trusted_network_is_allowed_and_nothing_beside_it():
    policy = FetchPolicy(allow_private=("10.1.0.0/16", "fd00::/8"))
    for address, allowed in {
        "10.1.2.3": True,
        "::ffff:10.1.2.3": True,
        "fd12::1": True,
        "10.2.0.1": False,
        "127.0.0.1": False,
    }.items():
        assert is_allowed(ipaddress.ip_address(address), policy) is allowed


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.com/a.png", "gopher://example.com", "javascript:1", "/etc/passwd", "a.png", "",
        "http:///a.png", "http://", "https://user@example.com/", "https://user:pw@example.com/",
        "https://example.com@127.0.0.1/", "http://ok\\@127.0.0.1/",
        "http://example.com\\.evil.org/", "http://exa mple.com/", "http://example.com/\r\nHost: a",
        "http://example.com/\x00", "http://example.com:22/", "http://example.com:8080/",
        "http://example.com:99999/", "http://example.com:x/", "http://127.0.0.1/", "http://127.0.0.1./",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://[fe80::1%25eth0]/", "http://[::1",
        "http://2130706433/", "http://0177.0.0.1/", "http://0x7f000001/", "http://0x7f.1/", "http://127.1/",
        "http://1.2.3/", "http://example.0x7f/", "http://①②⑦.0.0.1/", "http://127。0。0。1/",
        "http://169.254.169.254/latest/meta-data", "http://[fd00:ec2::254]/", "http://%31%32%37.0.0.1/",
        "https://example.com/" + "a" * 9000,
    ],
)  # fmt: skip
def test_addresses_that_are_refused(url):
    """Each by the field that holds it, and without its password."""
    with pytest.raises(MediaForbidden) as caught:
        check_url(url, FetchPolicy(), WHERE)
    assert caught.value.status == 400
    assert caught.value.param == WHERE
    assert "pw" not in caught.value.message


@pytest.mark.parametrize("text", ["", "a.png", "/etc/passwd", "example.com/a.png", "//a/b", "iVBORw0" * 9000])
def test_what_has_no_scheme_is_told_how_urls_and_base64_look(text):
    """Also base64 of any length by itself, which other servers take."""
    with pytest.raises(MediaForbidden, match="nor base64 in a data URL") as caught:
        check_url(text, FetchPolicy(), WHERE)
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://example.com/a.png?x=%20#y", "example.com"),
        ("HTTPS://EXAMPLE.com:443/a%2Fb", "example.com"),
        ("https://bücher.example/ü.png", "xn--bcher-kva.example"),
        ("https://8.8.8.8/", "8.8.8.8"),
        ("https://[2606:4700::1111]/", "2606:4700::1111"),
        ("https://1.example.com/", "1.example.com"),
    ],
)
def test_addresses_that_are_fetched(url, host):
    assert check_url(url, FetchPolicy(), WHERE).raw_host == host


def test_the_policy_narrows_schemes_hosts_and_ports():
    policy = FetchPolicy(allow_http=False, allowed_hosts=("a.org", ".b.org"), allowed_ports={443, 8443})
    for url in ("https://a.org/", "https://x.b.org:8443/", "https://A.org./"):
        check_url(url, policy, WHERE)
    for url in (
        "http://a.org/",
        "https://x.a.org/",
        "https://b.org/",
        "https://eb.org/",
        "https://a.org:80/",
    ):
        with pytest.raises(MediaForbidden):
            check_url(url, policy, WHERE)


def test_hosts_are_listed_as_urls_have_them():
    hosts = ("EXAMPLE.com", ".Bücher.example", "::1", "0:0::2", "a_b.org")
    policy = FetchPolicy(allowed_hosts=hosts, allow_private=("::/0",))
    assert policy.allowed_hosts == ("example.com", ".xn--bcher-kva.example", "::1", "::2", "a_b.org")
    for url in ("https://Example.com/", "https://www.bücher.example/", "https://[::1]/", "https://a_b.org/"):
        check_url(url, policy, WHERE)


@pytest.mark.parametrize(
    "entry", ["https://example.com", "example.com:80", "example.com/a", "*.example.com", "", ".", "a b"]
)
def test_a_list_with_an_entry_that_no_host_would_match_is_refused(entry):
    with pytest.raises(ValidationError, match=r"no host's name\. Write example\.com") as refused:
        FetchPolicy(allowed_hosts=("a.org", entry))
    assert refused.value.errors()[0]["loc"] == ("allowed_hosts",)


@pytest.mark.parametrize("port", [0, 65536])
def test_a_port_that_there_is_not_is_refused(port):
    with pytest.raises(ValidationError, match="allowed_ports"):
        FetchPolicy(allowed_ports={443, port})


@pytest.mark.parametrize("ports", [{True, 443}, frozenset({True}), [True]])
def test_a_boolean_is_no_port(ports):
    with pytest.raises(ValidationError, match="true and false"):
        FetchPolicy(allowed_ports=ports)


def test_the_timeout_comes_from_the_environment(monkeypatch):
    monkeypatch.delenv("SIGHTLINE_IMAGE_FETCH_TIMEOUT", raising=False)
    monkeypatch.delenv("VLLM_IMAGE_FETCH_TIMEOUT", raising=False)
    assert FetchPolicy().timeout == 5
    monkeypatch.setenv("VLLM_IMAGE_FETCH_TIMEOUT", "7.5")
    assert FetchPolicy().timeout == 7.5
    monkeypatch.setenv("SIGHTLINE_IMAGE_FETCH_TIMEOUT", "9")
    assert FetchPolicy().timeout == 9
    assert FetchPolicy(timeout=2).timeout == 2
