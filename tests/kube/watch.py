"""Watches: what has changed since a version, and what changes from now on."""

import asyncio
import json
from contextlib import suppress

from aiohttp import web

from tests.kube.api import Api, Call
from tests.kube.resources import Resource
from tests.kube.selectors import Matches
from tests.kube.status import Manifest
from tests.kube.store import Change


async def watch(request: web.Request, api: Api, call: Call) -> web.StreamResponse:
    """Answer with one event a line until the client goes, or for as long as it has asked."""
    resource, matches = api.authorize(call), api.selection(call)
    woken, loop = asyncio.Event(), asyncio.get_running_loop()
    response = web.StreamResponse(headers={"Content-Type": "application/json"})
    await response.prepare(request)

    def wake() -> None:
        with suppress(RuntimeError):  # the server has ended
            loop.call_soon_threadsafe(woken.set)

    with api.store.locked():
        unlisten = api.store.listen(wake)
        asked = call.query.get("resourceVersion", "")
        initial = asked in ("", "0") or call.query.get("sendInitialEvents") == "true"
        position = api.store.version if initial else int(asked)
        present = api.store.all(resource, call.path.namespace) if initial else []
    try:
        with suppress(ConnectionError, TimeoutError):
            async with asyncio.timeout(int(call.query.get("timeoutSeconds", "3600"))):
                for found in present:
                    if matches(found):
                        await _send(response, "ADDED", found, resource)
                if call.query.get("sendInitialEvents") == "true":
                    annotations = {"k8s.io/initial-events-end": "true"}
                    bookmark = {"metadata": {"resourceVersion": str(position), "annotations": annotations}}
                    await _send(response, "BOOKMARK", {"kind": resource.kind, **bookmark}, resource)
                while True:
                    woken.clear()
                    for change in api.store.changes[position:]:
                        position = change.version
                        if event := _event(change, resource, call.path.namespace, matches):
                            await _send(response, *event, resource)
                    await woken.wait()
    finally:
        unlisten()
    return response


def _event(change: Change, resource: Resource, namespace: str, matches: Matches) -> tuple[str, Manifest] | None:
    """Return what a watcher sees of a change: an object that no longer matches is deleted to him."""
    group, plural, place, _ = change.key
    if (group, plural) != (resource.group, resource.plural) or namespace not in ("", place):
        return None
    was = change.before is not None and matches(change.before)
    if change.after is not None and matches(change.after):
        return ("MODIFIED" if was else "ADDED"), change.after
    if was:
        gone = change.after or change.before
        assert gone is not None
        return "DELETED", gone
    return None


async def _send(response: web.StreamResponse, kind: str, found: Manifest, resource: Resource) -> None:
    event = {"type": kind, "object": {**found, "apiVersion": resource.api_version}}
    await response.write(json.dumps(event).encode() + b"\n")
