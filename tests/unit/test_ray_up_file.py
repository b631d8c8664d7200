"""k8s/ray-up.yaml and the settings of its provider, by our model and by Ray's own checks."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler import node_provider
from ray.autoscaler._private.providers import _get_node_provider_cls
from ray.autoscaler._private.util import hash_launch_conf, prepare_config, validate_config

from expertmesh.actors.kubernetes import provider as provider_module
from expertmesh.actors.kubernetes.manifests import locate, read_application, read_file
from expertmesh.cluster.errors import InputError
from expertmesh.cluster.kubernetes.settings import ProviderSettings, read_provider

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "k8s" / "ray-up.yaml"
TABLE = {"type": "external", "namespace": "ml", "manifests": "m"}


@pytest.fixture
def config() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(FILE.read_text())
    return found


def test_the_file_is_what_ray_takes(config: dict[str, Any]) -> None:
    schema = json.loads((Path(node_provider.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    prepared = prepare_config(config)
    validate_config(prepared)
    # All that Ray reads without asking whether it is there.
    source = (Path(node_provider.__file__).parent / "_private" / "commands.py").read_text()
    read = set(re.findall(r'\bconfig\["(\w+)"\]', source))
    assert read <= set(prepared)
    assert _get_node_provider_cls(config["provider"]) is provider_module.KubernetesProvider


def test_the_head_is_never_one_that_ray_would_replace(config: dict[str, Any]) -> None:
    """Ray starts another head where its type or the hash of its configuration differ from what the tags say."""
    pod = {"metadata": {"name": "p", "labels": {"ray.io/group": "headgroup", "ray.io/node-type": "head"}}}
    tags = provider_module._tags(pod)
    head_type = config["head_node_type"]
    assert tags["ray-user-node-type"] == head_type
    node_config = config["available_node_types"][head_type]["node_config"]
    assert tags["ray-launch-config"] == hash_launch_conf(node_config, config["auth"])


def test_the_file_is_what_the_provider_takes() -> None:
    settings, name = read_file(FILE)
    assert (name, settings.namespace, settings.manifests) == ("expertmesh", "expertmesh", "k8s/overlays/raycluster")
    assert locate(settings.manifests, FILE) == ROOT / "k8s" / "overlays" / "raycluster"
    file = ROOT / "k8s" / "overlays" / "raycluster" / "application.yaml"
    assert read_application(settings, FILE) == (file, file.read_text())


def test_options_win_over_the_file() -> None:
    settings, _ = read_file(FILE, {"namespace": "other", "timeout_s": 5.0})
    assert (settings.namespace, settings.timeout_s) == ("other", 5.0)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"contxt": "x"}, "provider.contxt is not known; known are type, module, namespace, context"),
        ({"namespace": None}, "provider.namespace: Input should be a valid string, got None"),
        ({"namespace": ""}, "provider.namespace: String should have at least 1 character"),
        ({"timeout_s": 0}, "provider.timeout_s: Input should be greater than 0, got 0"),
        ({"type": "aws"}, "provider.type: Input should be 'external', got 'aws'"),
        ({"patience_s": float("nan")}, "provider.patience_s: Input should be a finite number"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(change: dict[str, object], complaint: str) -> None:
    with pytest.raises(InputError, match=complaint):
        read_provider({**TABLE, **change})


def test_a_missing_setting_and_no_table_are_refused() -> None:
    with pytest.raises(InputError, match=r"provider\.manifests: Field required$"):
        read_provider({"namespace": "ml"})
    with pytest.raises(InputError, match="provider must be a table, got 'kuberay'"):
        read_provider("kuberay")


def test_ray_s_own_marks_are_left_out() -> None:
    assert read_provider({**TABLE, "_config_cache_path": "ray-config-1"}) == ProviderSettings(
        namespace="ml", manifests="m"
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("cluster_name: [", "while parsing"),
        ("applications: []", "has no cluster_name: it is not a file for `ray up`"),
        ("cluster_name: a", "provider must be a table, got None"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "f.yaml").write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_file(tmp_path / "f.yaml")
    with pytest.raises(InputError, match="No such file"):
        read_file(tmp_path / "absent.yaml")


def test_files_are_found_from_here_and_from_above_the_file_that_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named_in = tmp_path / "there" / "k8s" / "up.yaml"
    for folder in (tmp_path / "there" / "k8s" / "overlays", tmp_path / "here"):
        folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert locate("k8s/overlays", named_in) == tmp_path / "there" / "k8s" / "overlays"
    assert locate("overlays", named_in) == tmp_path / "there" / "k8s" / "overlays"
    with pytest.raises(InputError, match="there is no k8s/overlays: looked from"):
        locate("k8s/overlays", None)
    (tmp_path / "here" / "overlays").mkdir()
    assert locate("overlays", named_in) == tmp_path / "here" / "overlays"
    assert locate(str(tmp_path), named_in) == tmp_path


def test_an_application_is_the_one_named_else_the_one_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m").mkdir()
    settings = read_provider(TABLE)
    assert read_application(settings, None) is None
    (tmp_path / "m" / "application.yaml").write_text("beside")
    assert read_application(settings, None) == (tmp_path / "m" / "application.yaml", "beside")
    (tmp_path / "mine.yaml").write_text("mine")
    named = read_provider({**TABLE, "application": "mine.yaml"})
    assert read_application(named, None) == (tmp_path / "mine.yaml", "mine")
    with pytest.raises(InputError, match="Is a directory"):
        read_application(read_provider({**TABLE, "application": "m"}), None)


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("ray exec up.yaml ls", True),
        ("ray attach up.yaml", True),
        ("ray attach --start up.yaml", False),
        ("ray up up.yaml", False),
        ("ray down up.yaml", False),
        ("ray", False),
    ],
)
def test_commands_that_are_of_no_use_without_a_head(line: str, needs: bool) -> None:
    assert provider_module._needs_a_head(line.split()) == needs


def test_of_ray_s_command_the_file_is_the_one_with_a_provider(tmp_path: Path) -> None:
    find = provider_module._file_of_the_command
    other = tmp_path / "other.yaml"
    other.write_text("a: 1")
    (tmp_path / "template.yaml").write_text("a: {{ b }}: [")
    assert find(["ray", "rsync-up", str(other), str(FILE)]) == FILE
    assert find(["ray", "up", str(other), str(tmp_path / "template.yaml"), "absent.yaml"]) is None
