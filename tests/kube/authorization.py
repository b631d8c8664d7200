"""Who may do what: service accounts by Roles, as with RBAC; other users all that is not denied them."""

from dataclasses import dataclass, field

from tests.kube.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, ROLE_BINDINGS, ROLES
from tests.kube.status import ApiError, Manifest, qualified
from tests.kube.store import Store

_SERVICE_ACCOUNT = "system:serviceaccount:"


@dataclass(frozen=True)
class Access:
    """What somebody wants to do. resource is plural, with its subresource: pods/exec."""

    user: str
    verb: str
    group: str
    resource: str
    namespace: str = ""
    name: str = ""

    def refusal(self) -> ApiError:
        place = f'in the namespace "{self.namespace}"' if self.namespace else "at the cluster scope"
        plural = self.resource.partition("/")[0]
        named = f'{qualified(plural, self.group)} "{self.name}"' if self.name else qualified(plural, self.group)
        told = f'{named} is forbidden: User "{self.user}" cannot {self.verb} resource "{self.resource}"'
        told += f' in API group "{self.group}" {place}'
        return ApiError(403, told, details={"name": self.name, "group": self.group, "kind": plural})


@dataclass
class Authorizer:
    """Rules of the cluster. restricted: users that need Roles as service accounts do."""

    store: Store
    restricted: set[str] = field(default_factory=set)
    _denied: set[tuple[str, str, str]] = field(default_factory=set)

    def deny(self, user: str, verb: str, resource: str) -> None:
        """Deny a user a verb on a resource (`pods`, `pods/exec`); `*` is any."""
        self._denied.add((user, verb, resource))

    def check(self, access: Access) -> None:
        if not self.allows(access):
            raise access.refusal()

    def allows(self, access: Access) -> bool:
        for user, verb, resource in self._denied:
            if user == access.user and verb in ("*", access.verb) and resource in ("*", access.resource):
                return False
        if access.user not in self.restricted and not access.user.startswith(_SERVICE_ACCOUNT):
            return True
        return any(_covers(rule, access) for rule in self._rules_of(access))

    def _rules_of(self, access: Access) -> list[Manifest]:
        rules = []
        bindings = self.store.view(CLUSTER_ROLE_BINDINGS)
        if access.namespace:
            bindings += self.store.view(ROLE_BINDINGS, access.namespace)
        for binding in bindings:
            if not any(_is(subject, access.user) for subject in binding.get("subjects", ())):
                continue
            namespaced = binding["roleRef"]["kind"] == "Role"
            roles = self.store.view(ROLES, access.namespace) if namespaced else self.store.view(CLUSTER_ROLES)
            rules += [
                rule
                for role in roles
                if role["metadata"]["name"] == binding["roleRef"]["name"]
                for rule in role.get("rules") or ()
            ]
        return rules


def _is(subject: Manifest, user: str) -> bool:
    if subject["kind"] == "ServiceAccount":
        return f"{_SERVICE_ACCOUNT}{subject.get('namespace', '')}:{subject['name']}" == user
    return subject["kind"] == "User" and bool(subject["name"] == user)


def _covers(rule: Manifest, access: Access) -> bool:
    wanted = (("apiGroups", access.group), ("resources", access.resource), ("verbs", access.verb))
    if not all("*" in rule.get(field, ()) or value in rule.get(field, ()) for field, value in wanted):
        return False
    return not rule.get("resourceNames") or access.name in rule["resourceNames"]
