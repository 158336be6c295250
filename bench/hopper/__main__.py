"""`python -m bench.hopper`: see bench/hopper/measure.py."""

from bench.hopper.measure import main

if __name__ == "__main__":
    main()
