"""The `dpx` command."""

import sys

_MSG_MISSING = (
    "The `dpx` command needs packages that the library itself does not: {name} is missing. Install the extra `demo` of this package from where you "
    "have it, such as `pip install '.[demo]'` in its checkout. (The package called `dpx` on PyPI is another one.)"
)


def main() -> None:
    """Runs the command line."""
    try:
        from ._app import app
    except ModuleNotFoundError as error:
        sys.exit(_MSG_MISSING.format(name=error.name))
    app()
