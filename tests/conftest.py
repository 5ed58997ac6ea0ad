import os

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fastgpt", deadline=None)  # tests do not time
hypothesis.settings.load_profile("fastgpt")


def pytest_configure(config):
    # One test process per core (pytest-xdist): thread pools that spin against each other would take minutes.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def restore_threads():
    """Lets a test change the thread count."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
