"""``pytest benchmarks --quick``."""


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="small shapes and networks, nothing compiled")
