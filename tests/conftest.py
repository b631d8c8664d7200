"""What holds for all tests: hypothesis may take its time, as a loaded machine does."""

from hypothesis import settings

settings.register_profile("expertmesh", deadline=None)
settings.load_profile("expertmesh")
