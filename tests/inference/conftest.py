import pytest
from tiny import tiny

from layerroute.inference import Engine, Weights


@pytest.fixture(scope="session")
def model():
    return tiny("llama")


@pytest.fixture(scope="session")
def weights(model):
    return Weights.from_model(model)


@pytest.fixture
def engine(weights):
    return Engine(weights)
