"""What NVLM-D is: configuration, tensor names, number formats, files and modules.

Both `build` (makes artefacts) and `runtime` (runs them) import this package; it imports nothing
of ours. It knows no command line, no device policy and no scheduling.
"""

__version__ = "0.1.0"
