"""A fake Kubernetes cluster: the API server, pods, and KubeRay's operator, while a block lasts."""

import asyncio
import base64
import secrets
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import yaml
from aiohttp import web

from tests.certificates import Pair, make
from tests.kube.api import Api
from tests.kube.authorization import Authorizer
from tests.kube.faults import Faults
from tests.kube.kubelet import LOOPBACK, Kubelet
from tests.kube.operator import Operator
from tests.kube.resources import CRDS, NAMESPACES
from tests.kube.runner import PodRunner
from tests.kube.schemas import FILES, kuberay_crd
from tests.kube.server import Server, tls_context
from tests.kube.status import Manifest
from tests.kube.store import Store

ADMIN = "admin"


class FakeKubernetes:
    """A cluster that runs.

    Users are those of the certificates that the authority signs: a name that begins with `system:serviceaccount:` is
    allowed what Roles say, every other all that `authorizer` does not deny. Nothing is persistent.
    """

    def __init__(self, folder: Path, kubelet: Kubelet, nodes: tuple[str, ...]) -> None:
        self.store = Store()
        self.authorizer = Authorizer(self.store)
        self.faults = Faults()
        self.runner = PodRunner(self.store, kubelet, nodes)
        self.operator = Operator(self.store)
        self.port = 0
        self._folder = folder
        self._authority = make("kubernetes")
        self._tokens: dict[str, str] = {}
        self.ca_file = folder / "ca.pem"
        self.ca_file.write_bytes(self._authority.cert_pem)
        for name in ("default", "kube-system"):
            self.add_namespace(name)

    @property
    def url(self) -> str:
        return f"https://{LOOPBACK}:{self.port}"

    def add_namespace(self, name: str) -> None:
        labels = {"kubernetes.io/metadata.name": name}
        self.store.create(NAMESPACES, "", {"metadata": {"name": name, "labels": labels}, "status": {"phase": "Active"}})

    def install(self, crd: Manifest) -> None:
        """Install a definition: its kind is there from now on, until its object is deleted."""
        self.store.create(CRDS, "", {**crd, "metadata": {"name": crd["metadata"]["name"]}})

    def install_kuberay(self) -> None:
        """Install KubeRay's definitions; skips the test where nobody has them."""
        for kind in FILES:
            self.install(kuberay_crd(kind))

    def certificate(self, user: str, authority: Pair | None = None) -> tuple[Path, Path]:
        """Return the files of a user's certificate and key, signed by another authority if one is given."""
        name = f"{user.replace(':', '-')}-{secrets.token_hex(3)}"
        return make(user, authority or self._authority).write(self._folder, name)

    def kubeconfig(self, user: str = ADMIN, namespace: str = "default", *, by_token: bool = False) -> Path:
        """Write a kubeconfig with which a user is known by a certificate, or by a token."""
        if by_token:
            token = secrets.token_hex(16)
            self._tokens[token] = user
            credentials: Manifest = {"token": token}
        else:
            cert_file, key_file = self.certificate(user)
            credentials = {
                "client-certificate-data": base64.b64encode(cert_file.read_bytes()).decode(),
                "client-key-data": base64.b64encode(key_file.read_bytes()).decode(),
            }
        authority = base64.b64encode(self.ca_file.read_bytes()).decode()
        context = {"cluster": "fake", "user": user, "namespace": namespace}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url, "certificate-authority-data": authority}}],
            "users": [{"name": user, "user": credentials}],
            "contexts": [{"name": "fake", "context": context}],
            "current-context": "fake",
        }
        path = self._folder / f"kubeconfig-{secrets.token_hex(3)}"
        path.write_text(yaml.safe_dump(config))
        path.chmod(0o600)
        return path

    @contextmanager
    def serving(self) -> Iterator[None]:
        """Serve while the block lasts."""
        cert_file, key_file = make("kube-apiserver", self._authority).write(self._folder, "server")
        context = tls_context(str(cert_file), str(key_file), str(self.ca_file))
        handler = Server(Api(self.store, self.authorizer), self.faults, self.runner, self._tokens)
        loop, ready, stop = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
        loop.set_default_executor(ThreadPoolExecutor(64))  # a command in a pod has a thread as long as it runs

        async def run() -> None:
            runner = web.AppRunner(handler.application(), shutdown_timeout=1, access_log=None)
            await runner.setup()
            site = web.TCPSite(runner, LOOPBACK, 0, ssl_context=context)
            await site.start()
            self.port = runner.addresses[0][1]
            ready.set()
            await stop.wait()
            await runner.cleanup()
            watches = asyncio.all_tasks() - {asyncio.current_task()}
            for task in watches:
                task.cancel()
            await asyncio.gather(*watches, return_exceptions=True)
            await loop.shutdown_default_executor()

        thread = threading.Thread(target=loop.run_until_complete, args=(run(),), name="kube-api")
        thread.start()
        try:
            assert ready.wait(30), "the API server did not start"
            yield
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join()
            loop.close()


@contextmanager
def fake_kubernetes(
    folder: Path, kubelet: Kubelet, *, nodes: tuple[str, ...] = ("node-0", "node-1")
) -> Iterator[FakeKubernetes]:
    """Run a cluster while the block lasts.

    Args:
        folder: for certificates and kubeconfigs; empty.
        kubelet: runs the pods.
        nodes: their names.
    """
    cluster = FakeKubernetes(folder, kubelet, nodes)
    with cluster.serving():
        cluster.runner.start()
        cluster.operator.start()
        try:
            yield cluster
        finally:
            cluster.operator.close()
            cluster.runner.close()


def run_kubectl(
    program: str, config: Path, *arguments: str, stdin: str | None = None, timeout_s: float = 60
) -> "subprocess.CompletedProcess[str]":
    """Run kubectl with a kubeconfig."""
    env = {"KUBECONFIG": str(config), "HOME": str(config.parent), "PATH": "/usr/bin:/bin"}
    command = [program, *arguments]
    return subprocess.run(command, env=env, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False)
