#!/bin/bash
# `pip install --target` leaves out MPI's own library when it installs the wheel of MPICH.
#
# The wheel ships libmpi.so as data below lib/. pip reports success, and mpirun is there, but the
# folder has no lib/: --target skips every data folder that its staging area's own lib/python lies
# in (pip issue 10399, open since 2021). Only importing mpi4py shows it, by "cannot load MPI
# library". `--prefix` installs all files. Seen with mpich 5.0.2, mpi4py 4.1.2 and pip 25.3.
# Exits with 1 once --target brings the library, or --prefix does not.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv env
env/bin/python -m pip install --quiet --disable-pip-version-check pip==25.3 2>/dev/null
packages="mpich==5.0.2 mpi4py==4.1.2"
env/bin/python -m pip install --quiet --no-deps --target in_target $packages 2>/dev/null
env/bin/python -m pip install --quiet --no-deps --ignore-installed --prefix in_prefix $packages 2>/dev/null
env/bin/python -m pip --version | cut -d ' ' -f 1,2

cat >probe.py <<'P'
try:
    from mpi4py import MPI
    print("loaded", MPI.Get_library_version().split("\n")[0].split())
except RuntimeError as error:
    print("not loaded:", str(error).splitlines()[0])
P
probe() { # folder, its site-packages
  echo "$1: $(ls "$1" | tr '\n' ' ')"
  # HOME hides an MPI that the user has installed.
  HOME=$folder PYTHONPATH=$2 LD_LIBRARY_PATH=$1/lib env/bin/python probe.py | tee "$1.txt"
}
probe in_target in_target
probe in_prefix "$(echo in_prefix/lib/python3*/site-packages)"
[ -x in_target/bin/mpirun ] && [ ! -e in_target/lib/libmpi.so ] && [ -e in_prefix/lib/libmpi.so ] &&
  grep -q '^not loaded: cannot load MPI library' in_target.txt && grep -q '^loaded' in_prefix.txt
