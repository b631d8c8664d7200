"""Unit tests may not start Ray: logic that needs it to be tested belongs out of the actors."""

import pytest
import ray


@pytest.fixture(autouse=True)
def _no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise AssertionError("a unit test tried to start Ray")

    monkeypatch.setattr(ray, "init", refuse)
