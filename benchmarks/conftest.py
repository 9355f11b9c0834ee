"""Prints each benchmark file's tables when it is through: a later crash loses none."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def _tables(request):
    yield
    if request.module.report.tables:
        print(f"\n\n{request.module.report.markdown()}")
