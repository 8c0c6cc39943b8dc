"""``python -m kvcm_ray.connectors.py_client install|uninstall [FOLDER]``: see `installing`."""

import sys
from pathlib import Path

from kvcm_ray.connectors.py_client import install_files, uninstall_files
from kvcm_ray.errors import KvcmError


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] not in ("install", "uninstall") or len(arguments) > 2:
        print("usage: python -m kvcm_ray.connectors.py_client install|uninstall [SITE_PACKAGES]")
        return 2
    folder = Path(arguments[1]) if len(arguments) == 2 else None
    try:
        if arguments[0] == "install":
            print(f"written: {install_files(folder)}")
        else:
            print("removed" if uninstall_files(folder) else "nothing of ours is there")
    except (KvcmError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
