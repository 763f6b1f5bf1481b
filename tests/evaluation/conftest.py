import pytest

from tests.evaluation.files import make_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))
