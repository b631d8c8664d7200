"""What an operator may ask for: ranges, unknown names, and a file and options put together."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from expertmesh.actors.cli.configuration import read_settings
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.settings import ServeSettings, TlsSettings, is_loopback

MODEL = Path("model")


def write(directory: Path, text: str) -> Path:
    path = directory / "serve.toml"
    path.write_text(text)
    return path


def test_the_defaults_serve_on_loopback() -> None:
    settings = ServeSettings(model=MODEL)
    assert (settings.shards, settings.workers, settings.replicas) == (2, 1, 1)
    assert (settings.grpc_host, settings.grpc_port) == ("127.0.0.1", 50051)
    assert (settings.http, settings.http_host, settings.http_port) == (True, "127.0.0.1", 8000)


def test_settings_are_frozen() -> None:
    settings = ServeSettings(model=MODEL)
    with pytest.raises(ValidationError, match="frozen"):
        settings.shards = 3


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("shards", 0),
        ("shards", 1025),
        ("shards", 2.5),
        ("shards", "many"),
        ("workers", 0),
        ("workers", 1025),
        ("replicas", 0),
        ("dtype", "int8"),
        ("device", "tpu"),
        ("grpc_port", -1),
        ("grpc_port", 65536),
        ("http_port", -1),
        ("http_port", 65536),
        ("page_size", 0),
        ("page_size", 1025),
        ("kv_tokens", -1),
        ("max_batch_tokens", 0),
        ("max_sequences", 0),
        ("max_queue", 0),
        ("max_context", -1),
        ("shard_threads", -1),
        ("worker_threads", -1),
        ("link_timeout_s", 0),
        ("link_timeout_s", float("nan")),
        ("recovery_s", -0.1),
        ("recovery_s", float("inf")),
        ("capacity_factor", 0),
        ("hot_experts", -1),
        ("hot_experts", 65),
        ("metrics_port", -1),
        ("metrics_port", 65536),
        ("capacity_factor", -1.5),
        ("capacity_factor", float("nan")),
        ("capacity_factor", float("inf")),
        ("member_cpus", -1),
        ("room_timeout_s", 0),
        ("start_timeout_s", 0),
        ("start_timeout_s", float("inf")),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_options_name(name: str, value: object) -> None:
    with pytest.raises(InputError) as caught:
        read_settings(None, {"model": MODEL, name: value})
    assert str(caught.value).startswith(f"--{name.replace('_', '-')}: ")
    assert str(caught.value).endswith(f"got {value!r}")


@pytest.mark.parametrize(
    ("name", "value"),
    [("shards", 1), ("shards", 1024), ("grpc_port", 0), ("grpc_port", 65535), ("page_size", 1), ("recovery_s", 0)],
)
def test_the_ends_of_a_range_are_allowed(name: str, value: int) -> None:
    assert getattr(read_settings(None, {"model": MODEL, name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_message_bytes", 100),
        ("keepalive_s", 0),
        ("keepalive_timeout_s", 0.5),
        ("min_ping_s", 0),
        ("resume_s", 0),
        ("no_such", 1),
    ],
)
def test_a_limit_of_grpc_out_of_range_is_refused_by_its_path(tmp_path: Path, name: str, value: float) -> None:
    config = write(tmp_path, f"[grpc]\n{name} = {value}\n")
    with pytest.raises(InputError, match=rf"^grpc\.{name}: .*got {value}$"):
        read_settings(config, {"model": MODEL})


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--shard-count: .*not permitted, got 3"):
        read_settings(write(tmp_path, "shard_count = 3"), {"model": MODEL})
    with pytest.raises(ValidationError, match="shard_count"):
        ServeSettings(model=MODEL, shard_count=3)  # type: ignore[call-arg]


def test_more_replicas_than_shards_are_refused() -> None:
    assert read_settings(None, {"model": MODEL, "replicas": 3, "shards": 3}).replicas == 3
    with pytest.raises(InputError, match=r"replicas=3 needs at least as many shards, there are shards=2"):
        read_settings(None, {"model": MODEL, "replicas": 3})


def test_deterministic_is_for_cpus() -> None:
    assert not read_settings(None, {"model": MODEL}).deterministic
    assert read_settings(None, {"model": MODEL, "deterministic": True}).deterministic
    with pytest.raises(InputError, match="deterministic=true computes on CPUs, and device is cuda"):
        read_settings(None, {"model": MODEL, "deterministic": True, "device": "cuda"})


def test_deterministic_drops_nothing() -> None:
    assert read_settings(None, {"model": MODEL}).capacity_factor is None
    assert read_settings(None, {"model": MODEL, "capacity_factor": 1.25}).capacity_factor == 1.25
    with pytest.raises(InputError, match=r"deterministic=true is refused with capacity_factor=1.25: what is dropped"):
        read_settings(None, {"model": MODEL, "deterministic": True, "capacity_factor": 1.25})


def test_the_model_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--model: Field required"):
        read_settings(write(tmp_path, "shards = 3"), {})


def test_options_win_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    config = write(tmp_path, 'shards = 4\nworkers = 2\npage_size = 32\nlink_timeout_s = 1.5\ndtype = "bfloat16"\n')
    settings = read_settings(config, {"model": MODEL, "shards": 6})
    assert settings == ServeSettings(
        model=MODEL, shards=6, workers=2, page_size=32, link_timeout_s=1.5, dtype="bfloat16"
    )


def test_a_file_and_an_option_are_checked_together(tmp_path: Path) -> None:
    config = write(tmp_path, "replicas = 4\nshards = 4\n")
    assert read_settings(config, {"model": MODEL}).replicas == 4
    with pytest.raises(InputError, match=r"replicas=4 .* shards=2"):
        read_settings(config, {"model": MODEL, "shards": 2})


@pytest.mark.parametrize("content", [b"shards = ", b"shards: 4", b"\xff\xfe", b"shards = 1\nshards = 2"])
def test_a_file_that_is_no_toml_is_refused(content: bytes, tmp_path: Path) -> None:
    config = tmp_path / "serve.toml"
    config.write_bytes(content)
    with pytest.raises(InputError, match=f"--config {config}: "):
        read_settings(config, {"model": MODEL})


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--config .*nowhere.toml: .*No such file"):
        read_settings(tmp_path / "nowhere.toml", {"model": MODEL})
    with pytest.raises(InputError, match=f"--config {tmp_path}: "):
        read_settings(tmp_path, {"model": MODEL})


TWO_TIERS = "[autoscale.shards]\nmin_count = 2\nmax_count = 8\n[autoscale.workers]\nmax_count = 4\n"


def test_the_load_decides_only_when_asked(tmp_path: Path) -> None:
    assert read_settings(None, {"model": MODEL}).autoscale is None
    config = write(tmp_path, TWO_TIERS)
    from_file = read_settings(config, {"model": MODEL}).autoscale
    assert from_file is not None
    assert (from_file.shards.min_count, from_file.shards.max_count, from_file.workers.max_count) == (2, 8, 4)
    assert read_settings(config, {"model": MODEL}, autoscale=False).autoscale is None
    bounds = {"max_shards": 6, "min_workers": 1, "max_workers": 3}
    from_options = read_settings(None, {"model": MODEL}, autoscale=True, bounds=bounds).autoscale
    assert from_options is not None
    assert (from_options.shards.max_count, from_options.workers.max_count) == (6, 3)
    both = read_settings(config, {"model": MODEL}, bounds={"max_shards": 5}).autoscale
    assert both is not None
    assert (both.shards.min_count, both.shards.max_count) == (2, 5)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"max_workers": 2}, "--max-shards: Field required"),
        ({"max_shards": 0, "max_workers": 2}, "--max-shards: Input should be greater than or equal to 1, got 0"),
        ({"max_shards": 2, "max_workers": 2, "min_workers": 0}, "--min-workers: .* got 0"),
        ({"min_shards": 5, "max_shards": 4, "max_workers": 2}, r"autoscale\.shards: min_count=5 is above max_count=4"),
        ({"max_shards": 1, "max_workers": 2}, "shards=2 is above the most that the autoscaler may have, 1"),
        ({"max_shards": 2, "max_workers": 2}, "workers=3 is above the most that the autoscaler may have, 2"),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds: dict[str, int], message: str) -> None:
    given = {"model": MODEL, "workers": 3 if "workers=3" in message else 1}
    with pytest.raises(InputError, match=message):
        read_settings(None, given, autoscale=True, bounds=bounds)


def test_other_unfit_words_on_autoscaling_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-shards is for --autoscale"):
        read_settings(None, {"model": MODEL}, bounds={"max_shards": 4})
    with pytest.raises(InputError, match=r"autoscale\.workers\.up_delay: .*not permitted, got 3"):
        read_settings(write(tmp_path, TWO_TIERS + "up_delay = 3\n"), {"model": MODEL})
    with pytest.raises(InputError, match=r"--autoscale: .*, got 3"):
        read_settings(write(tmp_path, "autoscale = 3\n"), {"model": MODEL})
    with pytest.raises(InputError, match=r"autoscale\.shards: .*, got 3"):
        read_settings(write(tmp_path, "[autoscale]\nshards = 3\n"), {"model": MODEL}, bounds={"max_workers": 1})


def test_tls_files_come_from_the_file_and_from_options(tmp_path: Path) -> None:
    config = write(tmp_path, '[tls]\ncert_file = "a.pem"\nkey_file = "a.key"\n')
    tls = read_settings(config, {"model": MODEL}, tls={"tls_key": Path("b.key")}).tls
    assert tls == TlsSettings(cert_file=Path("a.pem"), key_file=Path("b.key"))
    assert read_settings(None, {"model": MODEL}).tls is None


def test_a_key_without_a_certificate_is_refused_by_the_options_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--tls-cert: Field required"):
        read_settings(None, {"model": MODEL}, tls={"tls_key": Path("a.key")})
    files = {"tls_cert": Path("a.pem"), "tls_key": Path("a.key")}
    with pytest.raises(InputError, match=r"^tls\.nothing: "):
        read_settings(write(tmp_path, '[tls]\nnothing = "x"\n'), {"model": MODEL}, tls=files)


def test_client_certificates_are_refused_where_http_would_ask_for_none() -> None:
    files = {"tls_cert": Path("a.pem"), "tls_key": Path("a.key"), "tls_client_ca": Path("ca.pem")}
    with pytest.raises(InputError, match=r"http_host=0\.0\.0\.0: Ray Serve's HTTP asks no client"):
        read_settings(None, {"model": MODEL, "http_host": "0.0.0.0"}, tls=files)  # noqa: S104
    for fields in ({"http_host": "0.0.0.0", "http": False}, {"http_host": "::1"}, {"http_host": "localhost"}):  # noqa: S104
        settings = read_settings(None, {"model": MODEL, **fields}, tls=files)
        assert settings.tls is not None
        assert settings.tls.client_ca_file == Path("ca.pem")


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        *((host, True) for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost")),
        *((host, False) for host in ("0.0.0.0", "10.0.0.1", "::", "example.org", "")),  # noqa: S104
    ],
)
def test_loopback_is_known(host: str, is_own: bool) -> None:
    assert is_loopback(host) is is_own
