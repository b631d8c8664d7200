"""The wait for a cluster: looks at it again and again, says what changed, gives up where waiting mends nothing."""

import time
from collections.abc import Callable, Sequence

from expertmesh.actors.kubernetes.applying import Say
from expertmesh.actors.kubernetes.kubectl import Kubectl
from expertmesh.actors.kubernetes.live import Picture, look
from expertmesh.cluster.errors import ExpertMeshError, UnavailableError
from expertmesh.cluster.kubernetes.pods import Trouble, describe_groups
from expertmesh.cluster.kubernetes.turnover import Turnover

# What is over within this time needs no progress.
_QUIET_S = 2.0


class Waiting:
    """One wait, or several after each other, within one timeout."""

    def __init__(self, kubectl: Kubectl, name: str, say: Say) -> None:
        self._kubectl = kubectl
        self._name = name
        self._say = say
        self._began_s = time.monotonic()
        self._said = ""
        # What has been wrong without a pause, by its key, since when.
        self._since_s: dict[str, float] = {}
        self._turnover = Turnover()

    def until(self, what: str, is_reached: Callable[[Picture], bool], beside: object = "") -> Picture:
        """Look until something is reached. A server that is away, and an UnavailableError of is_reached, may pass.

        Args:
            what: it is, for the line that it was not reached in time.
            is_reached: of a look.
            beside: what is told beside the pods, as its str() is then.

        Raises:
            UnavailableError: it was not reached in time; the line has what pods wait for.
            ExpertMeshError: a pod's trouble lasted longer than the settings' patience_s, or pods come and go.
        """
        settings = self._kubectl.settings
        while True:
            picture: Picture | None = None
            troubles: tuple[Trouble, ...] = ()
            try:
                picture = look(self._kubectl, self._name)
                if is_reached(picture):
                    return picture
                troubles = picture.troubles
            except UnavailableError as error:
                troubles = (Trouble("server", str(error)),)
            now_s = time.monotonic()
            self._since_s = {trouble.key: self._since_s.get(trouble.key, now_s) for trouble in troubles}
            self._progress(picture, troubles, str(beside), now_s)
            self._require_rest(picture)
            for trouble in troubles:
                if not trouble.does_wait and now_s - self._since_s[trouble.key] >= settings.patience_s:
                    raise ExpertMeshError(trouble.line)
            if now_s - self._began_s > settings.timeout_s:
                raise UnavailableError(self._too_late(what, picture, troubles, str(beside)))
            time.sleep(settings.poll_s)

    def _require_rest(self, picture: Picture | None) -> None:
        restless = self._turnover.restless(picture.states) if picture is not None else None
        if picture is not None and restless is not None:
            group, number = restless
            of_group = f"--selector=ray.io/cluster={picture.cluster},ray.io/group={group}"
            raise ExpertMeshError(
                f"pods of {group} end soon after they start, {number} so far, and others are made; see "
                f"{self._kubectl.shown()} logs {of_group} --all-containers --prefix --tail=50"
            )

    def _progress(self, picture: Picture | None, troubles: Sequence[Trouble], beside: str, now_s: float) -> None:
        if now_s - self._began_s < min(_QUIET_S, self._kubectl.settings.timeout_s):
            return
        line = "; ".join([*_states(picture, beside), *(trouble.line for trouble in troubles[:1])])
        if line and line != self._said:
            self._say(line)
            self._said = line

    def _too_late(self, what: str, picture: Picture | None, troubles: Sequence[Trouble], beside: str) -> str:
        kubectl = self._kubectl
        states = "; ".join(_states(picture, beside)) or "no pods"
        why = troubles[0].line if troubles else f"{states}; see {kubectl.shown()} get pods"
        return f"{what}: not within {kubectl.settings.timeout_s:g} s: {why}"


def _states(picture: Picture | None, beside: str) -> list[str]:
    groups = describe_groups(picture.states, picture.wanted) if picture is not None else ""
    return [part for part in (groups, beside) if part]
