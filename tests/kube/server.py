"""The API over HTTPS: who asks, what goes wrong on purpose, and what is answered."""

import asyncio
import json
import ssl
from typing import Any
from urllib.parse import unquote

import yaml
from aiohttp import web

from tests.kube import protobuf
from tests.kube.api import Answer, Api, Call
from tests.kube.discovery import answer as discover
from tests.kube.faults import Close, Faults, Hang, Request
from tests.kube.pod_streams import execute, logs
from tests.kube.resources import parse
from tests.kube.runner import PodRunner
from tests.kube.status import ApiError, Manifest
from tests.kube.watch import watch

_HEALTH = ("/healthz", "/livez", "/readyz")
_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Server:
    """The handler of all paths."""

    def __init__(self, api: Api, faults: Faults, runner: PodRunner, tokens: dict[str, str]) -> None:
        self._api = api
        self._faults = faults
        self._runner = runner
        self._tokens = tokens  # user by token

    def application(self) -> web.Application:
        application = web.Application(client_max_size=16 << 20)
        application.router.add_route("*", "/{path:.*}", self._answer)
        return application

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        try:
            if request.path in _HEALTH:
                return web.Response(text="ok")
            user = self._user(request)
            if request.path == "/openapi/v2":
                return web.Response()  # of kinds of which version 3 says nothing kubectl asks here; it is as empty
            if request.method == "GET" and (found := discover(request.path, self._api.resources())) is not None:
                return web.json_response(found)
            path = parse(unquote(request.path))
            if path is None:
                raise ApiError(404, "the server could not find the requested resource")
            call = Call(
                user,
                _verb(request, path.name, path.subresource),
                path,
                request.query,
                await _body(request),
                request.content_type,
            )
            return await self._carry_out(request, call)
        except ApiError as error:
            return web.json_response(error.body(), status=error.code)

    async def _carry_out(self, request: web.Request, call: Call) -> web.StreamResponse:
        fault = self._faults.next(call.verb, call.resource_name)
        try:
            if isinstance(fault, ApiError):
                raise fault
            if isinstance(fault, Hang):
                await asyncio.sleep(fault.seconds)
            if isinstance(fault, Close) and not fault.done:
                self._log(call, 0)
                return _closed(request)
            if call.verb == "watch":
                self._log(call, 200)
                return await watch(request, self._api, call)
            if call.path.subresource == "exec":
                self._api.authorize(call)
                self._log(call, 101)
                return await execute(request, self._runner, call.path)
            if call.path.subresource == "log":
                self._api.authorize(call)
                self._log(call, 200)
                return await logs(request, self._runner, call.path)
            answer = await asyncio.to_thread(self._handle, call)
        except ApiError as error:
            self._log(call, error.code)
            raise
        if isinstance(fault, Close):
            return _closed(request)
        quoted = [text.replace("\n", " ").replace('"', '\\"') for text in answer.warnings]
        headers = [("Warning", f'299 - "{text}"') for text in quoted]
        return web.json_response(answer.body, status=answer.code, headers=headers)

    def _handle(self, call: Call) -> Answer:
        for observe in self._faults.observers:
            observe(call)
        # Under the lock, so that the log has the order of the changes.
        with self._api.store.locked():
            answer = self._api.handle(call)
            self._log(call, answer.code)
            return answer

    def _log(self, call: Call, code: int) -> None:
        path = call.path
        request = Request(
            call.user,
            call.verb,
            call.resource_name,
            path.namespace,
            path.name,
            code,
            call.body,
            self._api.store.version,
        )
        self._faults.log.append(request)

    def _user(self, request: web.Request) -> str:
        """Return the name in the client's certificate, or whose the token is.

        Raises:
            ApiError: 401 for nobody.
        """
        assert request.transport is not None
        certificate: Any = request.transport.get_extra_info("peercert") or {}
        names = {key: value for part in certificate.get("subject", ()) for key, value in part}
        token = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
        user: str | None = self._tokens.get(token) if token else names.get("commonName")
        if user is None:
            raise ApiError(401, "Unauthorized")
        # As an administrator's `--as`; whom Roles bind has no rule for it here.
        return request.headers.get("Impersonate-User", user)


def _verb(request: web.Request, name: str, subresource: str) -> str:
    if subresource == "exec":
        return "create"  # whichever method its transport uses
    if request.method == "GET":
        watched = request.query.get("watch") in ("1", "true", "True")
        return "watch" if watched else "get" if name else "list"
    if request.method == "DELETE" and not name:
        return "deletecollection"
    return _VERBS.get(request.method, request.method.lower())


async def _body(request: web.Request) -> Manifest | list[Manifest] | None:
    if not request.can_read_body or request.headers.get("Upgrade"):
        return None
    if "protobuf" in request.content_type:
        data = await request.read()
        return protobuf.decode(data) if data else None
    text = await request.text()
    try:
        # Server-side apply sends YAML, whose JSON is also YAML.
        found: Manifest | list[Manifest] = (
            yaml.load(text, yaml.CSafeLoader) if "yaml" in request.content_type else json.loads(text)
        )
    except (ValueError, yaml.YAMLError) as error:
        raise ApiError(400, f"the body of the request cannot be read: {error}") from error
    return found


def _closed(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.abort()
    return web.Response()


def tls_context(cert_file: str, key_file: str, ca_file: str) -> ssl.SSLContext:
    """Serve with a certificate, and take clients' that the authority has signed."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca_file)
    context.load_cert_chain(cert_file, key_file)
    context.verify_mode = ssl.CERT_OPTIONAL  # a token may say who asks; who has neither is told 401
    return context
