"""What `ray up` and `expertmesh up` are told of a Kubernetes cluster: the `provider` of ray-up.yaml."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from expertmesh.cluster.errors import InputError


class ProviderSettings(BaseModel):
    """The table `provider`. Files are looked for from the working directory, else beside the file that names them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    type: Literal["external"] = "external"
    module: str = Field(default="", description="class of the provider, which Ray imports")
    namespace: str = Field(min_length=1, description="of everything that says nothing else itself; it must be there")
    context: str = Field(default="", description="of the kubeconfig; empty: its current one")
    kubeconfig: str = Field(default="", description="file; empty: as kubectl finds it (KUBECONFIG, ~/.kube/config)")
    kubectl: str = Field(default="kubectl", min_length=1, description="program, by name or path")
    manifests: str = Field(
        min_length=1,
        description="kustomize folder or YAML file with one RayCluster or RayService, and what it needs",
    )
    application: str = Field(
        default="",
        description="what `serve deploy` gets on a RayCluster; empty: application.yaml beside the manifests, if there",
    )
    image: str = Field(default="", description="of Ray's container in every group; empty: that of the manifests")
    timeout_s: float = Field(default=1800.0, gt=0, description="longest wait for what serves, or for pods to be gone")
    patience_s: float = Field(
        default=60.0,
        ge=0,
        description="how long a pod may be in a trouble that waiting seldom mends, as with images",
    )
    poll_s: float = Field(default=2.0, gt=0, description="seconds between two looks at the pods")
    request_timeout_s: float = Field(default=15.0, ge=1, description="longest wait for one answer of the server")


def read_provider(table: object, overrides: Mapping[str, Any] | None = None) -> ProviderSettings:
    """Check a table `provider`. Keys that begin with an underscore are Ray's own marks and are left out.

    Raises:
        InputError: it is no table, or a key is unknown, missing or out of range.
    """
    if not isinstance(table, Mapping):
        raise InputError(f"provider must be a table, got {table!r}")
    given = {str(key): value for key, value in table.items() if not str(key).startswith("_")}
    try:
        return ProviderSettings(**{**given, **(overrides or {})})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(ProviderSettings.model_fields)
            raise InputError(f"provider.{name} is not known; known are {known}", field=name) from None
        got = "" if first["type"] == "missing" else f", got {first['input']!r}"
        raise InputError(f"provider.{name}: {first['msg']}{got}", field=name) from None
