"""The application's builder, as Ray Serve calls it with the `args` of its configuration. Nothing is started."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from expertmesh.actors.gateway.application import ApplicationArguments, build
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import ServeSettings, is_loopback


def written(directory: Path, **texts: str) -> dict[str, Any]:
    for name, text in texts.items():
        (directory / name).write_text(text)
    return {name: directory / name for name in texts}


def bound(arguments: ApplicationArguments) -> tuple[Any, ServeSettings]:
    """Return the deployment and the settings that its constructor will be given."""
    application = build(arguments)
    deployment = application._bound_deployment
    return deployment, deployment.init_args[0]


def test_secrets_go_over_the_configuration(tmp_path: Path) -> None:
    files = written(
        tmp_path,
        config='model = "m"\nshards = 4\nstate = "redis://redis:6379"\n[nodes]\ngateways = {tier = "gateway"}\n',
        secrets='state = "redis://:word@redis:6379"\n',
    )
    deployment, settings = bound(ApplicationArguments(**files, drain_s=20))
    assert (settings.shards, settings.state) == (4, "redis://:word@redis:6379")
    assert deployment.ray_actor_options["label_selector"] == {"tier": "gateway"}
    assert deployment._deployment_config.graceful_shutdown_timeout_s > 20


@pytest.mark.parametrize("secrets", ["state = word-without-quotes", "[[["])
def test_what_is_wrong_with_secrets_is_said_without_them(tmp_path: Path, secrets: str) -> None:
    files = written(tmp_path, config='model = "m"\n', secrets=secrets)
    with pytest.raises(InputError, match="cannot be read as TOML") as refused:
        build(ApplicationArguments(**files))
    assert secrets not in str(refused.value)
    assert refused.value.__cause__ is None


def test_of_a_folder_the_last_file_that_names_a_key_has_it(tmp_path: Path) -> None:
    written(tmp_path, **{"50-b.toml": "shards = 3\n", "10-a.toml": 'model = "m"\nshards = 2\nworkers = 2\n', "c": "[["})
    (tmp_path / "none").mkdir()
    _, settings = bound(ApplicationArguments(config=tmp_path, secrets=tmp_path / "none"))
    assert (settings.shards, settings.workers) == (3, 2)


def test_http_is_never_taken_for_loopback(tmp_path: Path) -> None:
    """Where Serve's proxies listen the settings do not know, and on loopback anybody may administer without a key."""
    files = written(tmp_path, config='model = "m"\nhttp_host = "127.0.0.1"\n')
    _, settings = bound(ApplicationArguments(**files))
    assert not is_loopback(settings.http_host)
    tls = '[tls]\ncert_file = "c"\nkey_file = "k"\nclient_ca_file = "a"\n'
    with pytest.raises(InputError, match="client_ca_file"):
        build(ApplicationArguments(**written(tmp_path, config='model = "m"\n' + tls)))


def test_wrong_files_and_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="FileNotFoundError"):
        build(ApplicationArguments(config=tmp_path / "missing"))
    files = written(tmp_path, config='model = "m"\nshard = 4\n')
    with pytest.raises(InputError, match="shard"):
        build(ApplicationArguments(**files))
    with pytest.raises(ValidationError, match="confg"):
        ApplicationArguments(confg=tmp_path)  # type: ignore[call-arg]
