"""Says under which JAX the tests run."""

import jax
import jaxlib


def pytest_report_header() -> str:
    return f"jax {jax.__version__}, jaxlib {jaxlib.__version__}, {len(jax.devices())} x {jax.default_backend()}"
