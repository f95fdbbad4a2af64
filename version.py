"""The version of Switchyard, said once."""

VERSION = "0.1.0"
