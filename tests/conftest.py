"""What holds for all tests: hypothesis may take its time, as a loaded machine does."""

from hypothesis import HealthCheck, settings

settings.register_profile("expertmesh", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("expertmesh")
