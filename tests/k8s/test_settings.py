"""The application and its settings, by the code that reads them; what two files must say alike."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from expertmesh.actors.gateway import application
from expertmesh.cluster.settings import ServeSettings
from tests.k8s.manifests import (
    K8S,
    NAME,
    SERVICES,
    application_of,
    cluster_of,
    container_of,
    groups_of,
    of_kind,
    overlay,
    ports_of,
    serve_config,
    setting_files,
    settings_table,
)


@pytest.mark.parametrize("name", SERVICES)
def test_the_application_is_one_that_serve_and_we_take(name: str, tmp_path: Path) -> None:
    config = ServeDeploySchema.model_validate(serve_config(name))
    (deployed,) = config.applications
    assert deployed.import_path == f"{application.__name__}:{application.build.__name__}"
    for file, text in setting_files(name).items():
        (tmp_path / file).write_text(text)
    arguments = application.ApplicationArguments(**{**deployed.args, "config": tmp_path, "secrets": None})
    built = application.build(arguments)
    deployment = built._bound_deployment
    assert [d.name for d in deployed.deployments] == [deployment.name]
    assert deployment.init_args[0] == ServeSettings(**settings_table(name))


@pytest.mark.parametrize("name", SERVICES)
def test_files_that_are_named_are_mounted(name: str) -> None:
    arguments, table = application_of(name)["args"], settings_table(name)
    for tier, group in groups_of(name).items():
        mounts = {mount["mountPath"]: mount["name"] for mount in container_of(group)["volumeMounts"]}
        volumes = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert set(mounts.values()) == volumes, tier
        assert {arguments["config"], arguments["secrets"]} <= mounts.keys()
        if table["model"].startswith("/models"):
            assert "/models" in mounts
    gateway = {mount["mountPath"] for mount in container_of(groups_of(name)["gateway"])["volumeMounts"]}
    named = [*table.get("tls", {}).values(), *([table["keys"]] if "keys" in table else [])]
    assert {str(Path(file).parent) for file in named} <= gateway


def test_tls_changes_nothing_but_tls() -> None:
    encrypted, plain = serve_config("production"), serve_config("gpu")
    for option, setting in (("ssl_certfile", "cert_file"), ("ssl_keyfile", "key_file")):
        assert encrypted["http_options"].pop(option) == settings_table("production")["tls"][setting]
    assert encrypted == plain


def test_the_cluster_without_a_service_is_the_same() -> None:
    assert cluster_of("raycluster") == cluster_of("gpu")
    written = yaml.safe_load((K8S / "overlays" / "raycluster" / "application.yaml").read_text())
    assert written == serve_config("gpu")


def test_what_prometheus_operator_gets_is_what_prometheus_gets() -> None:
    objects: Any = overlay("production")
    (rule,), (monitor,) = of_kind(objects, "PrometheusRule"), of_kind(objects, "PodMonitor")
    assert rule["spec"] == yaml.safe_load((K8S / "monitoring" / "expertmesh-alerts.yaml").read_text())
    (job,) = yaml.safe_load((K8S / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    assert [
        {"source_labels" if key == "sourceLabels" else key: value for key, value in relabeling.items()}
        for relabeling in endpoint["metricRelabelings"]
    ] == job["metric_relabel_configs"]
    assert all(endpoint["port"] in ports_of(group) for group in groups_of("production").values())
    assert monitor["spec"]["selector"]["matchLabels"] == {NAME: "expertmesh"}
    (dashboard,) = [c for c in of_kind(objects, "ConfigMap") if "dashboard" in c["metadata"]["name"]]
    assert (
        dashboard["data"]["expertmesh-dashboard.json"] == (K8S / "monitoring" / "expertmesh-dashboard.json").read_text()
    )
