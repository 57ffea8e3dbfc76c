"""The command line: a module, or a sub-package, for each command or group of commands."""
