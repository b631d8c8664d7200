"""kubectl's own words, recorded from release 1.35 against servers that answer so, and the line made of each."""

import pickle

import pytest

from expertmesh.cluster.errors import (
    CapacityError,
    ConflictError,
    ExpertMeshError,
    ForbiddenError,
    InputError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from expertmesh.cluster.kubernetes.complaints import Cause, read_complaint

KUBECTL = "kubectl --context=lab --namespace=ml"

RECORDED = [
    (
        'Error from server (Forbidden): error when creating "STDIN": rayclusters.ray.io is forbidden: '
        'User "dev" cannot '
        'create resource "rayclusters" in API group "ray.io" in the namespace "ml"\n',
        Cause.FORBIDDEN,
        ForbiddenError,
        f"dev may not create rayclusters.ray.io in the namespace ml; see {KUBECTL} auth can-i create "
        f"rayclusters.ray.io",
    ),
    (
        "Error from server (Forbidden): error when retrieving current configuration of:\n"
        'Resource: "/v1, Resource=configmaps", GroupVersionKind: "/v1, Kind=ConfigMap"\nName: "x", Namespace: "ml"\n'
        'from server for: "STDIN": configmaps "x" is forbidden: User "dev" cannot get resource '
        '"configmaps" in API group '
        '"" in the namespace "ml"\n',
        Cause.FORBIDDEN,
        ForbiddenError,
        f"dev may not get configmaps in the namespace ml; see {KUBECTL} auth can-i get configmaps",
    ),
    (
        'Error from server (Forbidden): pods "a" is forbidden: User "dev" cannot create resource '
        '"pods/exec" in API group '
        '"" in the namespace "ml"\n',
        Cause.FORBIDDEN,
        ForbiddenError,
        f"dev may not create pods/exec in the namespace ml; see {KUBECTL} auth can-i create pods --subresource=exec",
    ),
    (
        'Error from server (Forbidden): nodes is forbidden: User "dev" cannot list resource "nodes" in API group "" at '
        "the cluster scope\n",
        Cause.FORBIDDEN,
        ForbiddenError,
        f"dev may not list nodes in the whole cluster; see {KUBECTL} auth can-i list nodes --all-namespaces",
    ),
    (
        'Error from server (Forbidden): error when creating "STDIN": pods "p" is forbidden: violates PodSecurity '
        '"restricted:latest": runAsNonRoot != true\n',
        Cause.FORBIDDEN,
        ForbiddenError,
        'refused: pods "p" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true; see '
        f"{KUBECTL} auth can-i --list",
    ),
    (
        'Error from server (Forbidden): error when creating "cm.yaml": configmaps "x" is forbidden: exceeded quota: '
        "small, requested: count/configmaps=1, used: count/configmaps=3, limited: count/configmaps=3\n",
        Cause.QUOTA,
        CapacityError,
        'configmaps "x" is beyond the quota small: requested: count/configmaps=1, used: count/configmaps=3, limited: '
        f"count/configmaps=3; see {KUBECTL} describe resourcequota small",
    ),
    (
        'Error from server (NotFound): error when creating "STDIN": namespaces "ml" not found\n',
        Cause.NO_NAMESPACE,
        InputError,
        "there is no namespace ml; kubectl create namespace ml makes it",
    ),
    (
        'error: resource mapping not found for name: "x" namespace: "ml" from "STDIN": no matches for '
        'kind "RayCluster" '
        'in version "ray.io/v1"\nensure CRDs are installed first\n',
        Cause.NO_KIND,
        NotFoundError,
        "the server knows no RayCluster of ray.io/v1: KubeRay is not installed: helm install kuberay-operator "
        f"kuberay/kuberay-operator --version 1.7.0; see {KUBECTL} get crd",
    ),
    (
        'resource mapping not found for name: "m" namespace: "" from "STDIN": no matches for kind "PodMonitor" in '
        'version "monitoring.coreos.com/v1"\nensure CRDs are installed first\n',
        Cause.NO_KIND,
        NotFoundError,
        "the server knows no PodMonitor of monitoring.coreos.com/v1: its CustomResourceDefinition is missing; see "
        f"{KUBECTL} api-resources --api-group=monitoring.coreos.com",
    ),
    (
        'error: the server doesn\'t have a resource type "rayclusters"\n',
        Cause.NO_KIND,
        NotFoundError,
        "the server knows no rayclusters of ray.io/v1: KubeRay is not installed: helm install kuberay-operator "
        f"kuberay/kuberay-operator --version 1.7.0; see {KUBECTL} get crd",
    ),
    (
        'The RayCluster "x" is invalid: \n* spec.workerGroupSpecs[0].minReplicas: Invalid value: "string": must be of '
        'type integer: "string"\n* spec.headGroupSpec.template: Required value\n',
        Cause.INVALID,
        InputError,
        'RayCluster "x" is invalid: spec.workerGroupSpecs[0].minReplicas: Invalid value: "string": must be of type '
        'integer: "string"; spec.headGroupSpec.template: Required value',
    ),
    (
        'The RayCluster "x" is invalid: spec.headGroupSpec.template: Required value\n',
        Cause.INVALID,
        InputError,
        'RayCluster "x" is invalid: spec.headGroupSpec.template: Required value',
    ),
    (
        'Error from server (BadRequest): error when creating "rc.yaml": RayCluster in version "v1" '
        "cannot be handled as a "
        'RayCluster: strict decoding error: unknown field "spec.foo"\n',
        Cause.INVALID,
        InputError,
        'RayCluster refused as wrong: strict decoding error: unknown field "spec.foo"',
    ),
    (
        'error: error validating "STDIN": error validating data: ValidationError(Service.spec): unknown '
        'field "prots" in '
        "io.k8s.api.core.v1.ServiceSpec; if you choose to ignore these errors, turn validation off with "
        "--validate=false\n",
        Cause.INVALID,
        InputError,
        'refused as wrong: ValidationError(Service.spec): unknown field "prots" in io.k8s.api.core.v1.ServiceSpec',
    ),
    (
        'Error from server (AlreadyExists): error when creating "rc.yaml": rayclusters.ray.io "x" already exists\n',
        Cause.ALREADY_EXISTS,
        ConflictError,
        'rayclusters.ray.io "x" already exists',
    ),
    (
        'Error from server (Conflict): error when replacing "rc.yaml": Operation cannot be fulfilled on '
        "rayclusters.ray.io "
        '"x": the object has been modified; please apply your changes to the latest version and try again\n',
        Cause.CONFLICT,
        ConflictError,
        'Operation cannot be fulfilled on rayclusters.ray.io "x": the object has been modified; please '
        "apply your changes "
        "to the latest version and try again",
    ),
    (
        "error: You must be logged in to the server (Unauthorized)\n",
        Cause.UNAUTHORIZED,
        UnauthenticatedError,
        f"the server does not know these credentials (401); see {KUBECTL} auth whoami",
    ),
    (
        'E1128 17:20:07.519270   10495 memcache.go:265] "Unhandled Error" err="couldn\'t get current server API group '
        'list: the server has asked for the client to provide credentials"\n'
        "error: You must be logged in to the server (the server has asked for the client to provide credentials)\n",
        Cause.UNAUTHORIZED,
        UnauthenticatedError,
        f"the server does not know these credentials (401); see {KUBECTL} auth whoami",
    ),
    (
        "Unable to connect to the server: getting credentials: exec: executable aws not found\n\nIt looks like you are "
        "trying to use a client-go credential plugin that is not installed.\n",
        Cause.UNAUTHORIZED,
        UnauthenticatedError,
        "the kubeconfig's way to credentials fails: exec: executable aws not found; see "
        f"{KUBECTL} config view --minify",
    ),
    (
        "Please enter Username: error: EOF\n",
        Cause.UNAUTHORIZED,
        UnauthenticatedError,
        f"the kubeconfig has no credentials for this context; see {KUBECTL} config view --minify",
    ),
    (
        "Unable to connect to the server: tls: failed to verify certificate: x509: certificate signed by unknown "
        "authority\n",
        Cause.UNTRUSTED,
        UnavailableError,
        "the server's certificate is not trusted: x509: certificate signed by unknown authority; see "
        f"certificate-authority in {KUBECTL} config view",
    ),
    (
        'error: error validating "cm.yaml": error validating data: failed to download openapi: Get '
        '"https://localhost:19301/openapi/v2?timeout=3s": tls: failed to verify certificate: x509: '
        "certificate relies on "
        "legacy Common Name field, use SANs instead; if you choose to ignore these errors, turn validation off with "
        "--validate=false\n",
        Cause.UNTRUSTED,
        UnavailableError,
        "the server's certificate is not trusted: x509: certificate relies on legacy Common Name field, "
        "use SANs instead; "
        f"see certificate-authority in {KUBECTL} config view",
    ),
    (
        "The connection to the server localhost:8080 was refused - did you specify the right host or port?\n",
        Cause.UNREACHABLE,
        UnavailableError,
        "kubectl has no kubeconfig: set KUBECONFIG, or give one; see kubectl config get-contexts",
    ),
    (
        "error: stat /nope: no such file or directory\n",
        Cause.CONFIG,
        InputError,
        f"stat /nope: no such file or directory; see {KUBECTL} config get-contexts",
    ),
    (
        'error: error loading config file "bad": yaml: line 1: did not find expected node content\n',
        Cause.CONFIG,
        InputError,
        f'error loading config file "bad": yaml: line 1: did not find expected node content; see {KUBECTL} config '
        "get-contexts",
    ),
    (
        'error: context "zz" does not exist\n',
        Cause.CONFIG,
        InputError,
        f'context "zz" does not exist; see {KUBECTL} config get-contexts',
    ),
    (
        "Error in configuration: \n* unable to read client-cert /nope.crt for a due to open /nope.crt: no such file or "
        "directory\n",
        Cause.CONFIG,
        InputError,
        "Error in configuration: * unable to read client-cert /nope.crt for a due to open /nope.crt: no such file or "
        f"directory; see {KUBECTL} config get-contexts",
    ),
    (
        "The connection to the server 127.0.0.1:1 was refused - did you specify the right host or port?\n",
        Cause.UNREACHABLE,
        UnavailableError,
        f"nothing listens at 127.0.0.1:1; see {KUBECTL} cluster-info",
    ),
    (
        "Unable to connect to the server: dial tcp: lookup no-such.invalid on 10.0.0.53:53: no such host\n",
        Cause.UNREACHABLE,
        UnavailableError,
        "the server's name is not known: lookup no-such.invalid on 10.0.0.53:53: no such host; see "
        f"{KUBECTL} config view --minify",
    ),
    (
        "Unable to connect to the server: net/http: request canceled (Client.Timeout exceeded while "
        "awaiting headers)\n",
        Cause.UNREACHABLE,
        UnavailableError,
        f"the server did not answer in time (Client.Timeout); see {KUBECTL} cluster-info",
    ),
    (
        'error: error validating "cm.yaml": error validating data: failed to download openapi: Get '
        '"http://127.0.0.1:1/openapi/v2?timeout=5s": dial tcp 127.0.0.1:1: connect: connection refused; '
        "if you choose to "
        "ignore these errors, turn validation off with --validate=false\n",
        Cause.UNREACHABLE,
        UnavailableError,
        f"the server cannot be reached: 127.0.0.1:1: connect: connection refused; see {KUBECTL} cluster-info",
    ),
    (
        'Error from server (InternalError): error when creating "rc.yaml": Internal error occurred: failed calling '
        'webhook "m.kb.io": failed to call webhook: no endpoints available for service "kuberay"\n',
        Cause.SERVER,
        UnavailableError,
        'the server failed (InternalError): Internal error occurred: failed calling webhook "m.kb.io": failed to call '
        f'webhook: no endpoints available for service "kuberay"; see {KUBECTL} get --raw /readyz?verbose',
    ),
    (
        'Error from server (TooManyRequests): error when creating "rc.yaml": Too many requests, please '
        "try again later.\n",
        Cause.SERVER,
        UnavailableError,
        "the server failed (TooManyRequests): Too many requests, please try again later.; see "
        f"{KUBECTL} get --raw /readyz?verbose",
    ),
    (
        "Error from server (NotFound): the server could not find the requested resource\n",
        Cause.NOT_FOUND,
        NotFoundError,
        "the server could not find the requested resource",
    ),
    (
        'error: unable to upgrade connection: container not found ("ray-head")\n',
        Cause.OTHER,
        ExpertMeshError,
        'unable to upgrade connection: container not found ("ray-head")',
    ),
    (
        'E1128 18:32:37.728000   10495 run.go:72] "command failed" err="accumulating resources: \\"a.yaml\\" is not '
        'there"\n',
        Cause.OTHER,
        ExpertMeshError,
        'accumulating resources: "a.yaml" is not there',
    ),
    ("", Cause.OTHER, ExpertMeshError, "kubectl failed and said nothing"),
]


@pytest.mark.parametrize(("stderr", "cause", "kind", "line"), RECORDED)
def test_what_kubectl_says_becomes_one_line(stderr: str, cause: Cause, kind: type[ExpertMeshError], line: str) -> None:
    complaint = read_complaint(stderr, KUBECTL)
    assert (complaint.cause, complaint.line) == (cause, line)
    error = complaint.error()
    assert type(error) is kind
    assert str(pickle.loads(pickle.dumps(error))) == line  # noqa: S301 - our own


def test_a_word_of_another_release_still_tells_the_cause() -> None:
    """Without the parts that releases word differently."""
    assert read_complaint("error: You must be logged in to the server", KUBECTL).cause is Cause.UNAUTHORIZED
    assert read_complaint("Error from server (Conflict): changed", KUBECTL).cause is Cause.CONFLICT
    assert read_complaint("Error from server (Forbidden): no", KUBECTL).cause is Cause.FORBIDDEN
    assert read_complaint('error: Context "x" does not exist', KUBECTL).cause is Cause.CONFIG
