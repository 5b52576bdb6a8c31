"""Decides which addresses a server may fetch media from. All that is not public is refused by default."""

from __future__ import annotations

import ipaddress
import os
import re
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from yarl import URL

from engine.errors import ConfigError, MediaForbidden
from engine.media.address import request_target
from engine.settings import Settings

#: Networks that ``is_global`` counts as public, but that lead inside or stand for other addresses.
_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "192.88.99.0/24",  # 6to4 relays
        "168.63.129.16/32",  # Azure's in-VM service
        "2002::/16",  # 6to4
        "2001::/32",  # Teredo
        "64:ff9b::/96",  # NAT64
        "64:ff9b:1::/48",  # local NAT64
        "::/96",  # IPv4-compatible
    )
)
_CONTROL = re.compile(r"[\x00-\x20\x7f-\x9f\\]")
_ENDS_IN_NUMBER = re.compile(r"(?:^|\.)(?:[0-9]+|0[xX][0-9a-fA-F]*)\.?$")
_MAX_URL = 8192
#: A host's name, or the end of names; addresses are told apart by :mod:`ipaddress`.
_HOST_ENTRY = re.compile(r"\.?[\w-]+(?:\.[\w-]+)*")
#: How each absolute URL begins.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")


def _from_environment(kind: str, otherwise: float) -> float:
    """The seconds that a variable of the environment says.

    Raises:
        ConfigError: it says something else.
    """
    for name in (f"SIGHTLINE_{kind}_FETCH_TIMEOUT", f"VLLM_{kind}_FETCH_TIMEOUT"):
        if value := os.environ.get(name):
            try:
                seconds = float(value)
            except ValueError:
                seconds = 0.0
            if not seconds > 0:
                raise ConfigError(
                    f"the environment variable {name} must be a number of seconds, not {value[:100]!r}"
                )
            return seconds
    return otherwise


class FetchPolicy(Settings):
    """The addresses and files that may be fetched, and the number of bytes.

    Attributes:
        allow_http: admit ``http``, not only ``https``.
        allowed_hosts: if given, only these hosts; ``.example.com`` stands for every host below example.com.
        allowed_ports: ports that may be dialled.
        allow_private: networks that may be dialled although they are not public.
        allowed_local_media_path: folder below which ``file`` URLs may be read; None refuses them all.
        timeout: seconds for one image, redirects and body included. Default from the environment variable
            SIGHTLINE_IMAGE_FETCH_TIMEOUT (or VLLM_IMAGE_FETCH_TIMEOUT), else 5.
        video_timeout: the same for a video. Default from VLLM_VIDEO_FETCH_TIMEOUT likewise, else 30.
        max_bytes: most bytes of one image.
        max_video_bytes: most bytes of one video.
        document_timeout: seconds for one document.
        max_document_bytes: most bytes of one document.
        max_total_bytes: most bytes of all items of a request.
        max_redirects: most redirects that are followed for one item.
        max_connections: most downloads at a time.
        max_connections_per_host: most downloads at a time from one host.
        max_waiting_per_host: most downloads that wait until earlier ones from the same host end.
        queue_timeout: seconds that a download may wait for its turn; they don't count as the host's.
    """

    allow_http: bool = True
    allowed_hosts: tuple[str, ...] | None = None
    allowed_ports: frozenset[Annotated[int, Field(ge=1, le=65535)]] = frozenset({80, 443})
    allow_private: tuple[IPv4Network | IPv6Network, ...] = ()
    allowed_local_media_path: str | Path | None = None
    timeout: PositiveFloat = Field(default_factory=lambda: _from_environment("IMAGE", 5.0))
    video_timeout: PositiveFloat = Field(default_factory=lambda: _from_environment("VIDEO", 30.0))
    max_bytes: PositiveInt = 32 << 20
    max_video_bytes: PositiveInt = 256 << 20
    document_timeout: PositiveFloat = 30.0
    max_document_bytes: PositiveInt = 64 << 20
    max_total_bytes: PositiveInt = 320 << 20
    max_redirects: int = Field(default=3, ge=0, le=10)
    max_connections: PositiveInt = 256
    max_connections_per_host: PositiveInt = 32
    max_waiting_per_host: PositiveInt = 256
    queue_timeout: PositiveFloat = 30.0

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts_as_urls_have_them(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return value if value is None else tuple(map(_host_entry, value))

    def byte_limit(self, kind: str) -> int:
        """Most bytes of one file of an ``image``, ``video`` or ``document``."""
        limits = {"video": self.max_video_bytes, "document": self.max_document_bytes}
        return limits.get(kind, self.max_bytes)

    def time_limit(self, kind: str) -> float:
        """Seconds that a host has for one file of that kind."""
        limits = {"video": self.video_timeout, "document": self.document_timeout}
        return limits.get(kind, self.timeout)


def _host_entry(entry: str) -> str:
    """An entry of ``allowed_hosts`` in the form of :attr:`yarl.URL.raw_host`: in lower case, in ASCII.

    Raises:
        ValueError: no host would match it.
    """
    try:
        return str(ipaddress.ip_address(entry))
    except ValueError:
        if not _HOST_ENTRY.fullmatch(entry):
            raise ValueError(
                f"{entry!r} is no host's name. Write example.com, or .example.com for all hosts below it, "
                "without scheme, port and path."
            ) from None
    name = entry.removeprefix(".")
    return entry[: -len(name)] + (URL.build(scheme="http", host=name).raw_host or "")


def check_url(text: str, policy: FetchPolicy, where: str) -> URL:
    """The address to fetch, after every check that needs no name resolution.

    Args:
        text: the caller's URL, or the one that a server redirects to; absolute.
        where: the field of the request, for errors.

    Returns:
        The parsed host and port that were checked, with path and query as ``text`` spells them; both are in
        the result's ``raw_path``.

    Raises:
        MediaForbidden: naming the host and what is wrong.
    """

    def refuse(reason: str) -> MediaForbidden:
        return MediaForbidden(f"{where}: {reason}", param=where)

    if not _SCHEME.match(text):
        raise refuse(
            "this is neither a URL with http:// or https:// before its host, nor base64 in a data URL, "
            "such as data:image/png;base64,iVBORw0..."
        )
    if len(text) > _MAX_URL:
        raise refuse(f"the URL is longer than {_MAX_URL} characters.")
    if _CONTROL.search(text):
        raise refuse("the URL has a backslash, whitespace or control character.")
    try:
        url = URL(text)
        host, port = (url.raw_host or "").rstrip(".").lower(), url.port
    except (ValueError, UnicodeError):
        raise refuse("the URL can't be parsed.") from None
    if url.scheme not in ("https", "http"):
        raise refuse(f"the scheme must be http, https or data, not {url.scheme[:16]!r}.")
    if url.scheme == "http" and not policy.allow_http:
        raise refuse("only https addresses are fetched.")
    if url.user is not None or url.password is not None or "@" in url.raw_authority:
        raise refuse("the URL must not carry a user name or password.")
    if not host or "%" in host:
        raise refuse("the URL has no usable host.")
    if policy.allowed_hosts is not None and not _listed(host, policy.allowed_hosts):
        raise refuse(f"the host {host} is not on the list of allowed hosts.")
    if port not in policy.allowed_ports:
        raise refuse(f"port {port} of {host} may not be fetched from.")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if _ENDS_IN_NUMBER.search(host):
            raise refuse("the host is a number in another form than a plain IP address.") from None
    else:
        if not is_allowed(address, policy):
            raise refuse(f"the address {host} is not public.")
    return URL.build(scheme=url.scheme, authority=url.raw_authority, path=request_target(text), encoded=True)


def is_allowed(address: IPv4Address | IPv6Address, policy: FetchPolicy) -> bool:
    """Return whether an address may be dialled: public, or in one of the policy's private networks."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        if address.ipv4_mapped is not None:
            return is_allowed(address.ipv4_mapped, policy)
    if any(address in network for network in policy.allow_private):
        return True
    if any(address in network for network in _NEVER):
        return False
    inward = (
        address.is_private
        or address.is_loopback
        or address.is_link_local
        or address.is_multicast
        or address.is_reserved
        or address.is_unspecified
        or (isinstance(address, IPv6Address) and address.is_site_local)
    )
    return address.is_global and not inward


def _listed(host: str, allowed: tuple[str, ...]) -> bool:
    return any(host == entry or (entry.startswith(".") and host.endswith(entry)) for entry in allowed)
