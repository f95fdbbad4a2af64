"""One adapter per engine, plus the parser of what that engine prints."""
