import pytest
from tiny import bypasses, tiny

from layerroute.inference import Engine, Weights


@pytest.fixture(scope="session")
def model():
    """A model in which two neighbouring blocks have a bypass and two have none."""
    model = tiny("llama")
    model.bypasses = bypasses(model.config.hidden_size, 2, 3)
    return model


@pytest.fixture(scope="session")
def weights(model):
    return Weights.from_model(model, bypasses=model.bypasses)


@pytest.fixture
def engine(weights):
    return Engine(weights)
