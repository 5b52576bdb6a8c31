"""Checks that nothing is in the way of ``serve run``: ``python -m deployments.preflight serve_config.yaml``.

Without it ``serve run`` would put the application into whatever Ray cluster it finds, in place of that
cluster's applications, and share a busy port with the other server: each would get some of the requests. An
option that does not exist, or a model that is not there, would be reported by a long traceback, and the
server would stay without an application. Misspelt options of Ray Serve would not be reported at all: without
``http_options`` the server listens on all interfaces.
"""

import argparse
import errno
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ray.serve.schema import ServeDeploySchema

from deployments.config import AppConfig
from deployments.in_place import overlaid
from deployments.stage_config import StageConfig
from engine.errors import ConfigError, SightlineError
from engine.model_parts import load_media_processor, load_prompt_builder, load_retrieval
from engine.settings import nearest, no_such_option

#: Ray Serve's defaults for ``http_options``.
_HOST, _PORT = "0.0.0.0", 8000
#: Values of ``import_path`` whose ``args`` are an :class:`~deployments.config.AppConfig`.
_BUILDERS = ("deployments.app:build", "deployments.app:build_stages")
#: Points to the list of options.
_LISTED = "docs/configuration.md lists all options."


class InTheWay(Exception):
    """Something that would go wrong; the message says how to change it."""


def main(arguments: list[str] | None = None) -> int:
    """Run all checks. Print the first obstacle and return 1, or return 0."""
    parser = argparse.ArgumentParser(prog="python -m deployments.preflight", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--address", help="the Ray cluster that serve run is told to use, or 'local'")
    options, _ = parser.parse_known_args(arguments)
    try:
        config = read_config(options.config)
        applications = check_applications(config)
        check_options(config)
        check_cluster(options.address, os.environ)
        if options.address in (None, "auto", "local"):
            check_files(applications, os.environ)
        check_port(config)
    except InTheWay as error:
        print(f"make serve: {error}", file=sys.stderr)
        return 1
    return 0


def read_config(path: Path) -> Mapping[str, Any]:
    """The file that ``serve run`` will read.

    Raises:
        InTheWay: there is no such file, or it is not YAML.
    """
    try:
        config = yaml.load(path.read_text(), _UniqueKeys)
    except OSError as error:
        raise InTheWay(f"{path} can't be read: {error.strerror}. Name another file by CONFIG=...") from None
    except UnicodeDecodeError:
        raise InTheWay(f"{path} is not text in UTF-8.") from None
    except yaml.YAMLError as error:
        raise InTheWay(f"{path} is not valid YAML: {error}") from None
    if not isinstance(config, Mapping):
        raise InTheWay(f"{path} should hold a mapping with proxy_location, http_options and applications.")
    return config


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in one mapping: PyYAML, and so ``serve run``, takes the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                # A number and a text of its digits are two keys.
                if (key.tag, key.value) in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"the option {key.value} stands twice in one place", key.start_mark
                    )
                seen.add((key.tag, key.value))
        return node


def check_applications(config: Mapping[str, Any]) -> dict[str, AppConfig]:
    """Check the options of the applications that are built here, and return them by their places.

    Raises:
        InTheWay: an option doesn't exist, is missing, or has a value that it can't have; or there is no such
            builder.
    """
    applications = config.get("applications")
    if not isinstance(applications, list) or not applications:
        raise InTheWay("the configuration has no applications: see serve_config.yaml.")
    found = {}
    for index, application in enumerate(applications):
        if not isinstance(application, Mapping):
            continue
        # Ray Serve takes a dot for the colon too.
        module, _, name = str(application.get("import_path")).replace(":", ".").rpartition(".")
        if f"{module}:{name}" not in _BUILDERS:
            if module == "deployments.app":
                known = " or ".join(_BUILDERS)
                raise InTheWay(f"applications[{index}].import_path must be {known}, not {module}:{name}.")
            continue
        where = f"applications[{index}].args"
        try:
            found[where] = AppConfig.model_validate(application.get("args") or {})
        except ValidationError as error:
            faults = [_fault(where, each, AppConfig) for each in error.errors()]
            raise InTheWay(" ".join([*faults, _LISTED])) from None
        except ConfigError as error:
            raise InTheWay(f"{error.message}.") from None
        _check_deployments(f"applications[{index}]", application, found[where])
    return found


def _check_deployments(where: str, application: Mapping[str, Any], args: AppConfig) -> None:
    """Check an application's changes of its deployments: of a name that there isn't Ray Serve tells once all
    models are loaded, and of a value for ``user_config`` the log of a replica alone.

    Raises:
        InTheWay: there is no such deployment, or it can't take over the value.
    """
    stages = _stages(args)
    given = application.get("deployments")
    for index, deployment in enumerate(given if isinstance(given, list) else []):
        if not isinstance(deployment, Mapping):
            continue
        place, name = f"{where}.deployments[{index}]", str(deployment.get("name"))
        if name not in stages:
            near = nearest(name, stages)
            others = f"did you mean {near}?" if near else f"there are {', '.join(sorted(stages))}."
            raise InTheWay(f"{place}.name: there is no deployment {name!r}; {others}")
        stage, changes = stages[name], deployment.get("user_config")
        if not isinstance(changes, Mapping):
            continue
        try:
            overlaid(stage, changes, stage.IN_PLACE)
        except ValidationError as error:
            faults = [_fault(f"{place}.user_config", each, type(stage)) for each in error.errors()]
            raise InTheWay(" ".join(faults)) from None
        except ValueError as error:
            raise InTheWay(f"{place}.user_config: {error}.") from None


def _stages(args: AppConfig) -> dict[str, StageConfig]:
    """The options of each deployment that an application of ``args`` may have, by its name."""
    found: dict[str, StageConfig] = {"Ingress": args.ingress}
    found |= dict.fromkeys(("Responses", "References"), StageConfig())
    for spec in args.models:
        found[f"Stages:{spec.slug}"] = StageConfig()
        found[f"Preprocessor:{spec.slug}"] = spec.preprocessor
        found[f"VisionEncoder:{spec.slug}"] = spec.encoder
        found[f"LanguageModel:{spec.slug}"] = spec.language_model
    return found


def check_options(config: Mapping[str, Any]) -> None:
    """Check Ray Serve's own options, of which it takes unknown ones in silence.

    Raises:
        InTheWay: an option doesn't exist, is missing, or has a value that it can't have.
    """
    if (unknown := next(_unknown(ServeDeploySchema, config), None)) is not None:
        raise InTheWay(unknown)
    try:
        ServeDeploySchema.model_validate(config)
    except ValidationError as error:
        faults = [_fault("", each, ServeDeploySchema) for each in error.errors()]
        raise InTheWay(" ".join(faults)) from None
    for index, application in enumerate(config["applications"]):
        prefix = application.get("route_prefix")
        # Its form doesn't look at it: Ray Serve does so when it deploys the application.
        if prefix is not None and not re.fullmatch(r"/|/[^{}]*[^/{}]", prefix):
            raise InTheWay(
                f"applications[{index}].route_prefix must be / or a path such as /vision, without a / behind "
                f"it, not {prefix!r}."
            )


def _unknown(form: type[BaseModel], given: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Error texts for the fields of ``given`` that ``form`` and the forms within it don't have."""
    for name, value in given.items():
        field = form.model_fields.get(name)
        if field is None:
            near = nearest(name, form.model_fields)
            hint = f"; did you mean {near}?" if near else "."
            yield f"{where}{name}: Ray Serve has no such option{hint}"
            continue
        options = (field.annotation, *get_args(field.annotation))
        forms = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
        entries = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, entry in entries:
            if forms and isinstance(entry, Mapping):
                place = "" if index is None else f"[{index}]"
                yield from _unknown(forms[0], entry, f"{where}{name}{place}.")


def check_files(applications: Mapping[str, AppConfig], environment: Mapping[str, str]) -> None:
    """Check what the options name on this machine: the files of models but for their tensors, and keys.

    Args:
        applications: by their places.
        environment: of the replicas, but for what the options add.

    Raises:
        InTheWay: a model can't be served from these files, or a key can't be read.
    """
    for where, args in applications.items():
        for index, spec in enumerate(args.models):
            try:
                load_retrieval(spec.engine, load_prompt_builder(spec.engine))
                load_media_processor(spec.engine)
            except SightlineError as error:
                field = f".{error.param}" if error.param else ""
                raise InTheWay(f"{where}.models[{index}].engine{field}: {error.message}") from None
        try:
            for key in args.ingress.keys:
                key.secret({**environment, **args.ingress.env})
        except ConfigError as error:
            raise InTheWay(f"{where}.ingress: {error.message}") from None


def _fault(where: str, error: ErrorDetails, whole: type[BaseModel]) -> str:
    """One fault of the options, with the way to it.

    Args:
        whole: the class that reads the options below ``where``.
    """
    path = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"] if part != "[key]"
    )
    path = f"{where}{path}".removeprefix(".")
    if error["type"] == "extra_forbidden":
        words = no_such_option(whole, error["loc"])
        return f"{path}: {words}" if words.endswith("?") else f"{path}: {words}."
    if error["type"] == "missing":
        return f"{path} must be given."
    return f"{path}: {error['msg'].removeprefix('Value error, ').rstrip('.')}."


def check_cluster(address: str | None, environment: Mapping[str, str]) -> None:
    """Check that ``serve run`` would start a cluster of its own, unless an address names the cluster to use.

    Args:
        address: its ``--address``.
        environment: its environment variables.

    Raises:
        InTheWay: it would use a cluster that somebody else has started, or fail to connect to it.
    """
    if address not in (None, "auto"):
        return
    found, said_by = environment.get("RAY_ADDRESS", ""), "RAY_ADDRESS"
    if found == "local":
        return
    if not found:
        # Written by `ray start`.
        file = Path(environment.get("RAY_TMPDIR") or tempfile.gettempdir()) / "ray" / "ray_current_cluster"
        found, said_by = file.read_text().strip() if file.exists() else "", str(file)
    if not found:
        return
    choose = (
        "To serve on a cluster of its own: make serve ARGS='--address local'. "
        f"To serve on that one, in place of what it serves now: make serve ARGS='--address {found}'."
    )
    if is_listening(found):
        raise InTheWay(f"another Ray cluster runs at {found} ({said_by}). {choose}")
    raise InTheWay(
        f"{said_by} names a Ray cluster at {found}, which does not answer. "
        + (f"Unset {said_by}, or" if said_by == "RAY_ADDRESS" else "Remove that file, or")
        + " serve on a cluster of its own: make serve ARGS='--address local'."
    )


def check_port(config: Mapping[str, Any]) -> None:
    """Check that the port of ``http_options`` is free.

    Raises:
        InTheWay: another program listens on it, or this user may not.
    """
    if config.get("proxy_location") == "Disabled":
        return
    options = config.get("http_options") or {}
    host, port = options.get("host") or _HOST, options.get("port", _PORT)
    if not isinstance(port, int) or not 0 <= port < 1 << 16:
        raise InTheWay(f"http_options.port must be a number below 65536, not {port!r}.")
    try:
        # Servers of Ray Serve share a port if they can. This socket doesn't, so it can't be had beside one.
        with socket.create_server((host, port)):
            pass
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InTheWay(
                f"port {port} of {host} is in use by {_listener(port)}. Stop it, or choose another "
                "port: http_options.port in the configuration."
            ) from None
        raise InTheWay(
            f"no server can listen on port {port} of {host}: {error.strerror}. Change http_options.host or "
            "http_options.port in the configuration."
        ) from None


def is_listening(address: str) -> bool:
    """Return whether a server accepts connections at ``host:port``."""
    match = re.fullmatch(r"(?:ray://)?(.+):(\d+)", address)
    if match is None:
        return False
    try:
        with socket.create_connection((match[1].strip("[]"), int(match[2])), timeout=2):
            return True
    except (OSError, OverflowError):
        return False


def _listener(port: int) -> str:
    """The program that listens on a port, as far as this user can see it."""
    try:
        import psutil

        for process in psutil.process_iter(["pid", "name", "cmdline"]):
            try:
                connections = process.net_connections("tcp")
            except psutil.Error:
                continue
            if any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections):
                title = " ".join(process.info["cmdline"] or ()).strip() or process.info["name"]
                served = " (another `make serve` or `serve run`)" if "ray::" in title else ""
                return f"process {process.pid}, {title[:60]}{served}"
    except ImportError:
        pass
    return "another program"


if __name__ == "__main__":
    sys.exit(main())
