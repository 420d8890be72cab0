"""What holds for every test."""

from hypothesis import HealthCheck, settings

# A busy machine is no defect: no test is timed.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
