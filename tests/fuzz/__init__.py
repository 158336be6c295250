"""Files and requests with something wrong in them, made at run time: docs/reliability.md."""
