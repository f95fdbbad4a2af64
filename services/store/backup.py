"""`python -m services.store.backup FILE`: copy the database, also while Switchyard is running.

`FILE` must not exist. docs/operations.md says how to restore it.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

from services.config import ConfigError, load_settings
from services.sizes import format_size
from services.state_folder import DATABASE, PRIVATE_FILE

LOCK_SECONDS = 60.0


class BackupError(Exception):
    """The copy could not be made. The text is for people."""


def back_up(database: Path, copy: Path) -> None:
    """Write a consistent copy of `database` to the new file `copy`, readable by this user only.

    Does not block writers. Raises BackupError, and leaves no partial copy then.
    """
    try:
        os.close(os.open(copy, os.O_CREAT | os.O_EXCL, PRIVATE_FILE))
    except OSError as error:
        raise BackupError(f"{copy} can't be made: {error.strerror}.") from None
    try:
        with closing(
            sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True, timeout=LOCK_SECONDS)
        ) as source:
            source.execute("VACUUM INTO ?", (str(copy),))
    except sqlite3.Error as error:
        copy.unlink()
        raise BackupError(f"The database {database} can't be copied to {copy}: {error}.") from None


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m services.store.backup", description=__doc__)
    parser.add_argument("file", type=Path, help="where to write the copy")
    copy = parser.parse_args().file
    try:
        database = load_settings().state_dir / DATABASE
        back_up(database, copy)
    except (BackupError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{copy} is a copy of {database.resolve()}, {format_size(copy.stat().st_size)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
