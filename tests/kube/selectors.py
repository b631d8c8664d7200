"""Label and field selectors of list and watch."""

import re
from collections.abc import Callable

from tests.kube.status import ApiError, Manifest

_SET = re.compile(r"^(?P<key>\S+)\s+(?P<operator>in|notin)\s+\((?P<values>[^)]*)\)$")
_EQUAL = re.compile(r"^(?P<key>[^!=\s]+)\s*(?P<operator>==|!=|=)\s*(?P<value>[^\s=]*)$")
_FIELDS = ("metadata.name", "metadata.namespace", "spec.nodeName", "status.phase", "type", "reason")
Matches = Callable[[Manifest], bool]


def by_labels(selector: str) -> Matches:
    """Return whether an object's labels are as `a=b,c!=d,e in (f,g),h notin (i),j,!k` says.

    Raises:
        ApiError: 400 for what is no selector.
    """
    terms = [_label_term(term.strip()) for term in re.split(r",(?![^(]*\))", selector) if term.strip()]
    return lambda found: all(term(found["metadata"].get("labels") or {}) for term in terms)


def _label_term(term: str) -> Callable[[dict[str, str]], bool]:
    if match := _SET.match(term):
        key, values = match["key"], {value.strip() for value in match["values"].split(",")}
        wanted = match["operator"] == "in"
        # As in Kubernetes, an object without the key is not in any set.
        return lambda labels: (labels.get(key) in values) is wanted
    if match := _EQUAL.match(term):
        key, value = match["key"], match["value"]
        equal = match["operator"] != "!="
        return lambda labels: (labels.get(key) == value) is equal
    if re.fullmatch(r"![^\s!=]+", term):
        return lambda labels: term[1:] not in labels
    if re.fullmatch(r"[^\s!=]+", term):
        return lambda labels: term in labels
    raise ApiError(400, f"unable to parse requirement: {term!r}")


def by_fields(selector: str) -> Matches:
    """Return whether an object's fields are as `metadata.name=a,involvedObject.kind!=Pod` says.

    Raises:
        ApiError: 400 for a field that nobody may select by.
    """
    terms = []
    for term in selector.split(",") if selector else ():
        match = _EQUAL.match(term)
        if match is None or not (match["key"] in _FIELDS or match["key"].startswith("involvedObject.")):
            raise ApiError(400, f'field label not supported: "{term}"')
        terms.append((match["key"], match["value"], match["operator"] != "!="))
    return lambda found: all((_field(found, key) == value) is equal for key, value, equal in terms)


def _field(found: Manifest, path: str) -> str:
    value: object = found
    for step in path.split("."):
        value = value.get(step, "") if isinstance(value, dict) else ""
    return str(value)
