"""What `up` reads in the words of `serve status`, recorded from Ray 2.60 with deployments that fail so."""

from expertmesh.actors.kubernetes.head import read_states

FAILED_TO_START = """\
proxies: {}

applications:
  mesh:
    status: DEPLOY_FAILED
    message: Failed to update the deployments ['Gateway'].
    last_deployed_time_s: 1795891798.4318147
    deployments:
      Gateway:
        status: DEPLOY_FAILED
        status_trigger: REPLICA_STARTUP_FAILED
        replica_states: {}
        message: |-
          The deployment failed to start 3 times in a row. See controller logs for details. Error:
          ray::ServeReplica:mesh:Gateway.initialize_and_get_metadata() (pid=3625)
            File "replica.py", line 1928, in initialize
              raise RuntimeError(traceback.format_exc()) from None
          RuntimeError: Traceback (most recent call last):
            File "application.py", line 5, in __init__
              raise InputError("shards is 0")
          expertmesh.cluster.errors.InputError: shards is 0
target_capacity: null
"""

FAILED_TO_BUILD = """\
proxies: {}

applications:
  mesh:
    status: DEPLOY_FAILED
    message: |
      Deploying app 'mesh' failed with exception:
      Traceback (most recent call last):
        File "application_state.py", line 1843, in build_serve_application
          raise RuntimeError(err_str) from None
      expertmesh.cluster.errors.InputError: settings: no such key
    last_deployed_time_s: 1795891804.2215495
    deployments: {}

target_capacity: null
"""

WELL = """\
proxies:
  a: HEALTHY

applications:
  mesh:
    status: RUNNING
    message: ''
    deployments:
      Gateway: {status: HEALTHY, status_trigger: UPSCALE_COMPLETED, replica_states: {RUNNING: 2}, message: old}
target_capacity: null
"""


def test_the_last_line_of_what_failed_says_what_is_wrong() -> None:
    started = read_states(FAILED_TO_START)
    assert started.failed == ["mesh"]
    assert started.messages == {"mesh": "expertmesh.cluster.errors.InputError: shards is 0"}
    built = read_states(FAILED_TO_BUILD)
    assert built.failed == ["mesh"]
    assert str(built) == "mesh DEPLOY_FAILED (expertmesh.cluster.errors.InputError: settings: no such key)"


def test_what_is_well_says_nothing() -> None:
    states = read_states(WELL)
    assert (states.are_running, states.failed, str(states)) == (True, [], "mesh RUNNING")


def test_none_are_not_well() -> None:
    for text in ("", "applications: {}\n", "proxies: {}\n"):
        states = read_states(text)
        assert (states.are_running, str(states)) == (False, "none yet")
