"""MiKV as a server: command line, HTTP, metrics and the offline class."""
