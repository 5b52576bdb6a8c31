"""API keys of the server, each with limits and caches of its own."""

import asyncio
import hashlib
import hmac
import os
import re
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path

from pydantic import Field, PositiveInt, SecretStr, model_validator
from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.admission import Place, is_work
from deployments.errors import error_response
from deployments.report import current_report
from deployments.turns import Turns
from engine.errors import ConfigError, InvalidRequest, Overloaded, SightlineError
from engine.media.ledger import Account, Ledger
from engine.settings import Settings

#: Paths that need no key: probes of machines, which hold none.
OPEN_PATHS = frozenset({"/health", "/ping", "/version"})
#: A key that a header can carry, see RFC 9110.
_KEY = re.compile(r"[!-~]+")


class Unauthorized(SightlineError):
    """The request has no valid API key."""

    status = 401
    code = "invalid_api_key"


class KeyConfig(Settings):
    """One API key. Exactly one of ``key``, ``env`` and ``file`` says what it is.

    Attributes:
        name: shown in logs and never sent by clients; keys with one name share limits and caches.
        key: the key itself; prefer the others, since configurations are shown and copied.
        env: environment variable of the ingress that holds the key.
        file: file that holds the key, such as a mounted secret.
        max_active_requests: requests for answers that may be open at a time, or go on in the background; more
            are refused with 429.
        max_active_tokens: prompt and completion tokens that open requests may ask for in all.
        own_cache: keeps cached content of this name apart from that of others.
    """

    name: str = Field(min_length=1, max_length=128)
    key: SecretStr | None = None
    env: str | None = None
    file: str | None = None
    max_active_requests: PositiveInt | None = None
    max_active_tokens: PositiveInt | None = None
    own_cache: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> "KeyConfig":
        if sum(source is not None for source in (self.key, self.env, self.file)) != 1:
            raise ValueError("exactly one of key, env and file must be given")
        return self

    def secret(self, environment: Mapping[str, str] = os.environ) -> str:
        """The key.

        Args:
            environment: holds the variable ``env``.

        Raises:
            ConfigError: the variable or file is missing or empty, or no client could send the key; the
                message holds no secret.
        """
        if self.key is not None:
            found = self.key.get_secret_value()
        elif self.env is not None:
            found = environment.get(self.env, "").strip()
        else:
            assert self.file is not None
            try:
                found = Path(self.file).read_text().strip()
            except OSError as error:
                raise ConfigError(f"the key {self.name!r} can't be read: {error}", param="keys") from error
        if not found:
            raise ConfigError(f"the key {self.name!r} is empty", param="keys")
        if not _KEY.fullmatch(found):
            raise ConfigError(
                f"the key {self.name!r} must consist of visible ASCII characters, without spaces",
                param="keys",
            )
        return found


class Caller:
    """The holder of a key, or everybody where there are no keys.

    Args:
        config: the key; None for everybody.

    Attributes:
        name: the key's name.
        salt: keeps cached content apart.
    """

    def __init__(self, config: KeyConfig | None = None) -> None:
        self.name = self.salt = ""
        self._max_requests: int | None = None
        self._max_tokens: int | None = None
        self._requests = self._tokens = 0
        self._turns = Turns()
        if config is not None:
            self.change(config)

    def change(self, config: KeyConfig) -> None:
        """Have other limits, or another cache, from the next request on."""
        self.name = config.name
        self.salt = f"{config.name}\n" if config.own_cache else ""
        self._max_requests, self._max_tokens = config.max_active_requests, config.max_active_tokens

    def enter(self, ledger: Ledger, *, works: bool = True) -> "Visit":
        """Begin a request, with an account in ``ledger``.

        Args:
            works: see :func:`~deployments.admission.is_work`; only such requests count.

        Raises:
            Overloaded: too many are open.
        """
        if works:
            if self._max_requests is not None and self._requests >= self._max_requests:
                raise self._refusal(
                    f"This API key has {self._requests} requests open, which is its limit; try again shortly."
                )
            if not self._requests:
                # Requests that were refused have not come back.
                self._turns.clear()
            self._requests += 1
        return Visit(self, ledger.account(self.name), works=works)

    def _refusal(self, message: str) -> Overloaded:
        """The error for a request beyond a limit. It says when open requests will have ended, at the rate at
        which they do."""
        error = Overloaded(message)
        error.retry_after_s = self._turns.book(time.monotonic())
        return error


class Visit(Place):
    """One request of a caller, the tokens that it asks for, and what its media take.

    Args:
        caller: the holder of the key.
        media: the request's account of the ledger.
        works: it counts as one of the caller's open requests.
    """

    def __init__(self, caller: Caller, media: Account, *, works: bool) -> None:
        super().__init__()
        self.caller = caller
        self.media = media
        self._works = works
        self._tokens = 0
        self._refused = False

    def charge(self, tokens: int) -> None:
        """Count tokens of the prompt and of the longest completion, until the request ends.

        Raises:
            InvalidRequest: this request alone asks for too many.
            Overloaded: the caller's open requests do together.
        """
        limit, active = self.caller._max_tokens, self.caller._tokens
        if limit is not None and active + tokens > limit:
            self._refused = True
            if self._tokens + tokens > limit:
                raise InvalidRequest(
                    f"This request asks for {self._tokens + tokens} tokens, prompt and answers together, and "
                    f"this API key's limit is {limit}. Ask for shorter answers, or show less."
                )
            raise self.caller._refusal(
                f"This API key's open requests ask for {active} tokens, and this request for {tokens}; its "
                f"limit is {limit}. Try again shortly."
            )
        self.caller._tokens += tokens
        self._tokens += tokens

    def _leave(self) -> None:
        self.media.close()
        if self._works:
            self.caller._requests -= 1
            if not self._refused:
                self.caller._turns.ended(time.monotonic())
        self.caller._tokens -= self._tokens
        self._tokens = 0


#: The request that the current task works on.
visit: ContextVar[Visit | None] = ContextVar("visit", default=None)


def caller_salt(salt: str) -> str:
    """``salt`` of the current request, within the caller's own cache."""
    current = visit.get()
    return salt if current is None else current.caller.salt + salt


def caller_name() -> str:
    """The name of the current request's key; empty if there is none."""
    current = visit.get()
    return "" if current is None else current.caller.name


def charge(tokens: int) -> None:
    """Count tokens that the current request asks for; errors as :meth:`Visit.charge`."""
    current = visit.get()
    if current is not None:
        current.charge(tokens)


def hold_open(task: asyncio.Future) -> None:
    """Keep the current request open for its caller until ``task`` has ended, beyond its response."""
    current = visit.get()
    if current is not None:
        current.hold(task)


def media_account() -> Account:
    """The account of the current request's media; outside of requests one that counts for nobody."""
    current = visit.get()
    return Ledger().account("") if current is None else current.media


class Access:
    """Lets in the holders of keys, on every path but :data:`OPEN_PATHS`.

    Everybody may enter until :meth:`change` was given keys.

    Args:
        page: the files of the pages need no key either: browsers send none with an address. The pages hold
            nothing but a field for it.
        ledger: counts what the media of open requests take.
    """

    def __init__(self, *, page: bool = False, ledger: Ledger) -> None:
        self._page = page
        self._ledger = ledger
        self._everybody = Caller()
        self._keys: list[tuple[bytes, Caller]] = []

    def change(self, keys: Sequence[KeyConfig]) -> None:
        """Let in the holders of ``keys`` instead. Requests that are open stay so, and count.

        Raises:
            ConfigError: a key can't be read, or is another's; then nothing changes.
        """
        # Digests have one length, so comparing them tells nothing of a key's.
        read = [(_digest(key.secret()), key) for key in keys]
        names: dict[bytes, str] = {}
        for digest, key in read:
            if names.setdefault(digest, key.name) != key.name:
                raise ConfigError(f"the keys {names[digest]!r} and {key.name!r} are the same", param="keys")
        former = {caller.name: caller for _, caller in self._keys}
        callers: dict[str, Caller] = {}
        for _, key in read:
            if key.name not in callers:
                callers[key.name] = former.get(key.name) or Caller(key)
                callers[key.name].change(key)
        self._keys = [(digest, callers[key.name]) for digest, key in read]

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this check."""

        async def check(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or self._is_open(scope["method"], scope["path"]):
                await app(scope, receive, send)
                return
            try:
                entered = self._caller(scope).enter(self._ledger, works=is_work(scope))
            except SightlineError as error:
                await error_response(error, scope)(scope, receive, send)
                return
            current_report().key = entered.caller.name
            token = visit.set(entered)
            try:
                await app(scope, receive, send)
            finally:
                visit.reset(token)
                entered.end()

        return check

    def _is_open(self, method: str, path: str) -> bool:
        if path in OPEN_PATHS or method == "OPTIONS":
            return True
        return self._page and method == "GET" and (path in ("/", "/docs") or path.startswith("/page/"))

    def _caller(self, scope: Scope) -> Caller:
        if not self._keys:
            return self._everybody
        given = other = b""
        for name, value in scope["headers"]:
            if name == b"authorization":
                scheme, _, rest = value.partition(b" ")
                given = rest if scheme.lower() == b"bearer" else b""
            elif name == b"x-api-key":
                other = value
        given = given or other
        if not given:
            raise Unauthorized("No API key was sent. Send it in the header 'Authorization: Bearer KEY'.")
        digest = _digest(given.strip().decode("latin-1"))
        # All keys are compared, whichever fits.
        found = [caller for known, caller in self._keys if hmac.compare_digest(known, digest)]
        if not found:
            raise Unauthorized("The API key is not known here.")
        return found[0]


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
