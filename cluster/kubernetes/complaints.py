"""What kubectl says on stderr when it fails, read: which kind of failure, and one line that says how to see more.

The patterns are of the output of kubectl 1.35 and 1.32, and loose enough for others: what follows a word that matters
is taken as it comes.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

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

INSTALL_KUBERAY = "helm install kuberay-operator kuberay/kuberay-operator --version 1.7.0"


class Cause(StrEnum):
    """Why kubectl failed, as far as anybody acts on it."""

    CONFIG = "config"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    QUOTA = "quota"
    NO_NAMESPACE = "no namespace"
    NO_KIND = "no kind"
    NOT_FOUND = "not found"
    INVALID = "invalid"
    ALREADY_EXISTS = "already exists"
    CONFLICT = "conflict"
    UNTRUSTED = "untrusted"
    UNREACHABLE = "unreachable"
    SERVER = "server"
    OTHER = "other"


_ERRORS: dict[Cause, type[ExpertMeshError]] = {
    Cause.CONFIG: InputError,
    Cause.UNAUTHORIZED: UnauthenticatedError,
    Cause.FORBIDDEN: ForbiddenError,
    Cause.QUOTA: CapacityError,
    Cause.NO_NAMESPACE: InputError,
    Cause.NO_KIND: NotFoundError,
    Cause.NOT_FOUND: NotFoundError,
    Cause.INVALID: InputError,
    Cause.ALREADY_EXISTS: ConflictError,
    Cause.CONFLICT: ConflictError,
    Cause.UNTRUSTED: UnavailableError,
    Cause.UNREACHABLE: UnavailableError,
    Cause.SERVER: UnavailableError,
    Cause.OTHER: ExpertMeshError,
}


@dataclass(frozen=True, slots=True)
class Complaint:
    """A failure of kubectl in one line."""

    cause: Cause
    line: str

    def error(self) -> ExpertMeshError:
        """Return the error of our tree that says it."""
        return _ERRORS[self.cause](self.line)


def read_complaint(stderr: str, kubectl: str) -> Complaint:
    """Read what kubectl wrote when it failed.

    Args:
        stderr: all of it.
        kubectl: the command with its context and namespace, for what the line proposes.
    """
    text = re.sub(r'error when \w+ "[^"]*": ', "", plain(stderr))
    for cause, pattern, tell in _RULES:
        found = re.search(pattern, text, re.DOTALL)
        if found:
            return Complaint(cause, " ".join(tell(found, kubectl).split()))
    lines = text.splitlines() or ["kubectl failed and said nothing"]
    return Complaint(Cause.OTHER, lines[0])


def plain(stderr: str) -> str:
    """Return what kubectl says without the lines of its log, such as `E1128 17:20:07.519270 95 memcache.go:265] ...`.

    They repeat what the last line says; releases up to 1.32 log some failures and say nothing beside it.
    """
    lines = stderr.strip().splitlines()
    said = [line for line in lines if not re.match(r"[EIWF]\d{4} ", line)]
    logged = re.search(r'\berr="(.*)"$', lines[-1]) if lines and not said else None
    return logged[1].replace('\\"', '"') if logged else "\n".join(said)


def missing_kind(kind: str, group_version: str, kubectl: str) -> Complaint:
    """Return the complaint about a kind that the server does not know."""
    group = group_version.rpartition("/")[0]
    if group == "ray.io":
        how = f"KubeRay is not installed: {INSTALL_KUBERAY}; see {kubectl} get crd"
    else:
        how = f"its CustomResourceDefinition is missing; see {kubectl} api-resources --api-group={group}"
    return Complaint(Cause.NO_KIND, f"the server knows no {kind} of {group_version}: {how}")


def _quota(found: re.Match[str], kubectl: str) -> str:
    what, quota, numbers = found.group("what", "quota", "numbers")
    return f"{what} is beyond the quota {quota}: {numbers}; see {kubectl} describe resourcequota {quota}"


def _forbidden(found: re.Match[str], kubectl: str) -> str:
    user, verb, resource, group, namespace = found.group("user", "verb", "resource", "group", "namespace")
    name, _, part = resource.partition("/")
    full = name + (f".{group}" if group else "")
    where = f"in the namespace {namespace}" if namespace else "in the whole cluster"
    option = (f" --subresource={part}" if part else "") + ("" if namespace else " --all-namespaces")
    what = f"{full}/{part}" if part else full
    return f"{user} may not {verb} {what} {where}; see {kubectl} auth can-i {verb} {full}{option}"


def _no_kind(found: re.Match[str], kubectl: str) -> str:
    return missing_kind(found.group("kind"), found.group("version"), kubectl).line


def _no_type(found: re.Match[str], kubectl: str) -> str:
    kind = found.group("kind")
    if kind.lower().startswith("ray"):
        return missing_kind(kind, "ray.io/v1", kubectl).line
    return f"the server knows no {kind}; see {kubectl} api-resources"


def _invalid(found: re.Match[str], _kubectl: str) -> str:
    fields = [line.strip().removeprefix("* ") for line in found.group("fields").splitlines() if line.strip()]
    return f"{found.group('what')} is invalid: {'; '.join(fields)}"


def _config(found: re.Match[str], kubectl: str) -> str:
    return f"{' '.join(found.group().split())}; see {kubectl} config get-contexts"


def _saying(text: str) -> Callable[[re.Match[str], str], str]:
    """Return what puts the groups of a match, and the command, into a text."""
    return lambda found, kubectl: text.format(kubectl=kubectl, **{k: v or "" for k, v in found.groupdict().items()})


# The first that matches counts: what a server answered stands before what keeps one from asking it.
_RULES: tuple[tuple[Cause, str, Callable[[re.Match[str], str], str]], ...] = (
    (
        Cause.QUOTA,
        r'(?P<what>[\w.]+ "[^"]*") is forbidden: exceeded quota: (?P<quota>[^\s,]+), (?P<numbers>[^\n]+)',
        _quota,
    ),
    (
        Cause.FORBIDDEN,
        r'User "(?P<user>[^"]*)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
        r'(?: in the namespace "(?P<namespace>[^"]+)")?',
        _forbidden,
    ),
    (Cause.FORBIDDEN, r"\(Forbidden\): (?P<why>[^\n]+)", _saying("refused: {why}; see {kubectl} auth can-i --list")),
    (
        Cause.NO_NAMESPACE,
        r'namespaces "(?P<name>[^"]+)" not found',
        _saying("there is no namespace {name}; kubectl create namespace {name} makes it"),
    ),
    (Cause.NO_KIND, r'no matches for kind "(?P<kind>[^"]+)" in version "(?P<version>[^"]+)"', _no_kind),
    (Cause.NO_KIND, r'doesn\'t have a resource type "(?P<kind>[^"]+)"', _no_type),
    (Cause.INVALID, r'The (?P<what>\w+ "[^"]*") is invalid: *(?P<fields>.+)', _invalid),
    (
        Cause.INVALID,
        r"\(BadRequest\): (?:(?P<kind>\w+) in version \S+ cannot be handled as a \w+: )?(?P<why>[^\n]+)",
        _saying("{kind} refused as wrong: {why}"),
    ),
    (
        Cause.INVALID,
        r"error validating data: (?!failed to download)(?P<why>[^\n]+?)(?:; if you choose to ignore.*)?$",
        _saying("refused as wrong: {why}"),
    ),
    (Cause.ALREADY_EXISTS, r"\(AlreadyExists\): (?P<why>[^\n]+)", _saying("{why}")),
    (Cause.CONFLICT, r"\(Conflict\): (?P<why>[^\n]+)", _saying("{why}")),
    (
        Cause.UNAUTHORIZED,
        r"You must be logged in|\(Unauthorized\)|provide credentials|\bUnauthorized\b",
        _saying("the server does not know these credentials (401); see {kubectl} auth whoami"),
    ),
    (
        Cause.UNAUTHORIZED,
        r"getting credentials: (?P<why>[^\n]+)",
        _saying("the kubeconfig's way to credentials fails: {why}; see {kubectl} config view --minify"),
    ),
    (
        Cause.UNAUTHORIZED,
        r"Please enter (?:Username|Password)",
        _saying("the kubeconfig has no credentials for this context; see {kubectl} config view --minify"),
    ),
    (
        Cause.UNTRUSTED,
        r"(?:tls: [^\n;]*?)?(?P<why>x509: [^\n;]+)",
        _saying("the server's certificate is not trusted: {why}; see certificate-authority in {kubectl} config view"),
    ),
    (Cause.UNTRUSTED, r"(?P<why>remote error: tls: [^\n;]+)", _saying("the server ends the connection: {why}")),
    (
        Cause.UNREACHABLE,
        r"localhost:8080 was refused|http://localhost:8080/[^\n]*connection refused|no configuration has been provided",
        _saying("kubectl has no kubeconfig: set KUBECONFIG, or give one; see kubectl config get-contexts"),
    ),
    (
        Cause.CONFIG,
        r"error loading config file [^\n]+|stat \S+: no such file or directory|[Cc]ontext \"?[^\n]*does not exist"
        r"|context was not found for specified context: [^\n]+|(?:cluster|auth info) \"[^\n]*does not exist"
        r"|[Ee]rror in configuration: .+|invalid configuration: [^\n]+",
        _config,
    ),
    (
        Cause.UNREACHABLE,
        r"The connection to the server (?P<server>\S+) was refused",
        _saying("nothing listens at {server}; see {kubectl} cluster-info"),
    ),
    (
        Cause.UNREACHABLE,
        r"(?P<why>lookup \S+[^\n]*?no such host)",
        _saying("the server's name is not known: {why}; see {kubectl} config view --minify"),
    ),
    (
        Cause.SERVER,
        r"Error from server(?: \((?P<reason>InternalError|ServiceUnavailable|Timeout|ServerTimeout|TooManyRequests)\))"
        r": (?P<why>[^\n]+)",
        _saying("the server failed ({reason}): {why}; see {kubectl} get --raw /readyz?verbose"),
    ),
    (
        Cause.UNREACHABLE,
        r"(?P<why>Client\.Timeout|context deadline exceeded|i/o timeout|TLS handshake timeout)",
        _saying("the server did not answer in time ({why}); see {kubectl} cluster-info"),
    ),
    (
        Cause.UNREACHABLE,
        r"(?:Unable to connect to the server: |dial tcp )(?P<why>[^\n;]+)",
        _saying("the server cannot be reached: {why}; see {kubectl} cluster-info"),
    ),
    (
        Cause.UNREACHABLE,
        r"(?P<why>connection reset by peer|unexpected EOF|\bEOF$|http2: [^\n]+|lost connection to pod)",
        _saying("the connection to the server broke ({why}); see {kubectl} cluster-info"),
    ),
    (Cause.NOT_FOUND, r"\(NotFound\): (?P<why>[^\n]+)", _saying("{why}")),
    (Cause.OTHER, r"(?:error: |Error from server[^:\n]*: )(?P<why>[^\n]+)", _saying("{why}")),
)
